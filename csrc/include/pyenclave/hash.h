#ifndef PYENCLAVE_HASH_H
#define PYENCLAVE_HASH_H

#include "pyenclave/base.h"

#endif
