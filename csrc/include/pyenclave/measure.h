#ifndef PYENCLAVE_MEASURE_H
#define PYENCLAVE_MEASURE_H

#include "pyenclave/base.h"

#endif
