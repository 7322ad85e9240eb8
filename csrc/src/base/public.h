/* public.h - the places where what follows from a secret becomes public, by design.
 *
 * The tests' build for valgrind (PYE_SECRETS_CHECK) hides secrets by marking them undefined, and
 * must be told where an answer may be known: everything before is then checked, and nothing else
 * is excused. In every other build PYE_PUBLIC does nothing. */
#ifndef PYE_SRC_BASE_PUBLIC_H
#define PYE_SRC_BASE_PUBLIC_H

#if defined(PYE_SECRETS_CHECK)
#include <valgrind/memcheck.h>
#define PYE_PUBLIC(x) ((void)VALGRIND_MAKE_MEM_DEFINED(&(x), sizeof(x)))
#else
#define PYE_PUBLIC(x) ((void)(x))
#endif

#endif
