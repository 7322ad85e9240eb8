"""The data plane of the native core.

No logic lives here: hold the buffers, check lengths, drop the GIL, turn a status into an
exception. Each area has a file of its own, included below.
"""

include "base.pxi"

# -- AES-GCM and page sealing ------------------------------------------------------------------
include "gcm.pxi"
include "page.pxi"
include "file.pxi"

# -- hashing and measuring ---------------------------------------------------------------------
include "hash.pxi"
include "ecdsa.pxi"
include "measure.pxi"
include "launch.pxi"

# -- calls -------------------------------------------------------------------------------------
include "frame.pxi"
include "ring.pxi"

# -- processes and secret memory ---------------------------------------------------------------
include "linux.pxi"
include "protect.pxi"

# -- sealed memory -----------------------------------------------------------------------------
include "heap.pxi"
include "heap_note.pxi"
include "heap_numpy.pxi"
