/*
 * pyenclave.h - the C interface of pyenclave's native core.
 *
 * The core is a static library without mutable globals (the cached CPU feature word apart): it is
 * linked into two extension modules, so any other global would exist twice. State lives in
 * handles. Only src/linux makes system calls. A function that can fail returns pye_status, which
 * must be used; on failure every output is zeroed.
 *
 * The cffi declarations are made from these headers (csrc/bindings/ffi_build.py), so each
 * declaration ends with ";" at the end of a line and constants are plain #defines.
 */
#ifndef PYENCLAVE_H
#define PYENCLAVE_H

#include "pyenclave/base.h"
#include "pyenclave/gcm.h"
#include "pyenclave/hash.h"
#include "pyenclave/ecdsa.h"
#include "pyenclave/page.h"
#include "pyenclave/epoch.h"
#include "pyenclave/tree.h"
#include "pyenclave/heap.h"
#include "pyenclave/extents.h"
#include "pyenclave/measure.h"
#include "pyenclave/launch.h"
#include "pyenclave/batch.h"
#include "pyenclave/call.h"
#include "pyenclave/stats.h"
#include "pyenclave/linux.h"
#include "pyenclave/protect.h"

#endif
