/* page_impl.h - what epoch.c knows of a page key beyond its interface. */
#ifndef PYE_SRC_PAGE_PAGE_IMPL_H
#define PYE_SRC_PAGE_PAGE_IMPL_H

#include "pyenclave/page.h"

/* page_key_set_base makes every version that `key` gives out from now on be `base` + its counter.
 * To be called before the first, with a multiple of 2^40. */
void page_key_set_base(pye_page_key *key, uint64_t base);

#endif
