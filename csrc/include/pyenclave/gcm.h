#ifndef PYENCLAVE_GCM_H
#define PYENCLAVE_GCM_H

#include "pyenclave/base.h"

#endif
