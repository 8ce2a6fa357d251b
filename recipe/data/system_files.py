"""Names that belong to an operating system, a network disk or an editor: no part of any data set, and never counted.

A zip file or a disk from a Mac has `._name.jpg` beside each picture, a Synology has `@eaDir` with a thumbnail of each,
the root of a fresh volume has `lost+found`.
"""

from __future__ import annotations

import re
from fnmatch import translate

PATTERNS = (
    *("._*", ".DS_Store", "__MACOSX", ".AppleDouble", ".AppleDB", ".AppleDesktop", ".apdisk", ".localized", "Icon\r"),
    *(".Spotlight-V100", ".fseventsd", ".TemporaryItems", ".DocumentRevisions-V100", ".VolumeIcon.icns", ".Trash*"),
    *("Network Trash Folder", "Temporary Items"),
    *("$RECYCLE.BIN", "RECYCLER", "System Volume Information", "Thumbs.db", "ehthumbs.db", "ehthumbs_vista.db"),
    *("desktop.ini", "~$*"),
    *("lost+found", ".directory", ".thumbnails", ".~lock.*#", ".nfs*", ".fuse_hidden*", ".smbdelete*"),
    *("@eaDir", "@tmp", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", ".@__thumb", ".snapshot", ".zfs"),
    *(".dropbox", ".dropbox.attr", ".dropbox.cache", ".stfolder", ".stversions", ".sync"),
    *(".ipynb_checkpoints", "__pycache__"),
)
NAMES = re.compile("|".join(map(translate, PATTERNS)), re.IGNORECASE)


def belongs_to_system(name: str) -> bool:
    """Whether a file or folder of this name is passed over, wherever it is found."""
    return NAMES.match(name) is not None
