/* namespaces.h - the namespaces a worker gets, in the order of the PYE_NS_* bits. */
#ifndef PYE_SRC_LINUX_NAMESPACES_H
#define PYE_SRC_LINUX_NAMESPACES_H

#include "pyenclave/linux.h"

/* pye_namespace_id returns the inode number of this process's namespace `index`, 0 if unknown. */
uint64_t pye_namespace_id(size_t index);

#endif
