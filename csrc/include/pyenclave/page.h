#ifndef PYENCLAVE_PAGE_H
#define PYENCLAVE_PAGE_H

#include "pyenclave/base.h"

#endif
