#ifndef PYENCLAVE_CALL_H
#define PYENCLAVE_CALL_H

#include "pyenclave/base.h"

#endif
