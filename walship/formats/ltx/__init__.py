"""LTX, version 3: pages of a database between two transaction ids, in Litestream's dialect.

`header | page frames, ascending | 6 zero bytes | page index | index size u64 | trailer`, all fixed integers
big-endian; layouts in docs/format.md section 4, facts behind them in the LTX notes of the design. The payload of our
frames, our snapshots and the files of an archive are all this, so that `litestream restore` reads what we keep.

Rules a writer here cannot break, because a reader elsewhere would restore a wrong database in silence:

* pages strictly ascend and none is above `commit`;
* the lock page is in no file (it is left out when given);
* every page by which the database grows is in the file; minTXID 1 means "snapshot", which grows from nothing;
* the database checksum is not in the file (flags 2, both fields zero): ours travels in the frame header.

The file checksum covers the decompressed pages, so any LZ4 encoder's output is as good as another's.
"""

from walship.formats.ltx.decoder import LtxDecoder, decode
from walship.formats.ltx.encoder import LtxEncoder, encode
from walship.formats.ltx.header import HEADER_SIZE, NO_CHECKSUM, TRAILER_SIZE, LtxHeader, LtxTrailer
from walship.formats.ltx.index import PageIndex, ReadAt, open_index, page_index, read_page
from walship.formats.ltx.merge import merge, merge_header, merge_index
from walship.formats.ltx.page import PAGE_HEADER_SIZE

__all__ = [
    "HEADER_SIZE",
    "NO_CHECKSUM",
    "PAGE_HEADER_SIZE",
    "TRAILER_SIZE",
    "LtxDecoder",
    "LtxEncoder",
    "LtxHeader",
    "LtxTrailer",
    "PageIndex",
    "ReadAt",
    "decode",
    "encode",
    "merge",
    "merge_header",
    "merge_index",
    "open_index",
    "page_index",
    "read_page",
]
