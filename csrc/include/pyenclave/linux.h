#ifndef PYENCLAVE_LINUX_H
#define PYENCLAVE_LINUX_H

#include "pyenclave/base.h"

#endif
