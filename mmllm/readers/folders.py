"""Folders of pictures as people have them: which files are pictures, by their names, and why others are passed over.

Training, captioning, checks and the page share this one list of endings. The content decides what a file really is.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath, PurePosixPath

from mmllm.images import HEIF_INSTALL

# fmt: off
HEIF_ENDINGS = (".heic", ".heif", ".hif")
PICTURE_ENDINGS = (
    ".apng", ".avif", ".bmp", ".dib", ".gif", *HEIF_ENDINGS, ".j2c", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpf",
    ".jpg", ".jpx", ".mpo", ".pbm", ".pgm", ".pjp", ".pjpeg", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)
SIDECAR_ENDINGS = (".json", ".txt", ".text", ".caption")  # of files that describe the picture beside them
_UNREAD_ENDINGS = {
    "JPEG XL": (".jxl",),
    "JPEG XR": (".hdp", ".jxr", ".wdp"),
    "a camera's raw file": (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw"),
    "a Photoshop or GIMP file": (".psb", ".psd", ".xcf"),
    "a drawing": (".ai", ".eps", ".emf", ".svg", ".svgz", ".wmf"),
    "a picture in a rare format": (".exr", ".hdr", ".ico", ".pcx", ".qoi", ".tga"),
}
# Folders and files that operating systems and their tools leave among people's own.
_SYSTEM_FOLDERS = ("$recycle.bin", "#recycle", "@eadir", "lost+found", "system volume information")
_SYSTEM_FILES = ("desktop.ini", "ehthumbs.db", "icon\r", "thumbs.db")
# fmt: on


@dataclass
class FolderFiles:
    """The files of a folder, by their paths inside it."""

    pictures: list[str] = field(default_factory=list)
    sidecars: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)  # {picture that cannot be read: the reason}
    passed_over: Counter[str] = field(default_factory=Counter)  # {reason: how many of all other files}

    def unread_by_reason(self) -> Counter[str]:
        """{reason, with one file as an example: how many}."""
        examples = {reason: name for name, reason in reversed(self.unread.items())}
        counts = Counter(self.unread.values())
        return Counter({f"{reason} (such as {examples[reason]})": count for reason, count in counts.items()})


def ending_of(name: str) -> str:
    return PurePath(name).suffix.lower()


def classify_files(names: Iterable[str]) -> FolderFiles:
    """The pictures, sidecars and other files among `names`, which are paths inside a folder and keep their order."""
    files = FolderFiles()
    for name in names:
        ending = ending_of(name)
        if reason := _why_passed_over(name):
            files.passed_over[reason] += 1
        elif ending in PICTURE_ENDINGS:
            files.pictures.append(name)
        elif ending in SIDECAR_ENDINGS:
            files.sidecars.append(name)
        elif kind := next((kind for kind, endings in _UNREAD_ENDINGS.items() if ending in endings), None):
            files.unread[name] = f"{kind} ({ending}), which is not read; convert it to PNG or JPEG"
        else:
            files.passed_over[f"no picture by its name ({ending or 'without an ending'})"] += 1
    return files


def _why_passed_over(name: str) -> str | None:
    """Why a person did not put this file there as a picture or a caption; None where they may have."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if "__MACOSX" in parts:
        return "in __MACOSX, where a Mac keeps attributes"
    if parts[-1].startswith("._"):
        return "`._` files, where a Mac keeps attributes"
    if parts[-1].lower() in (*_SYSTEM_FILES, ".ds_store") or any(part.lower() in _SYSTEM_FOLDERS for part in parts):
        return "of the operating system"
    if any(part.startswith(".") for part in parts):
        return "hidden, its name or folder begins with a dot"
    return None


def missing_package(name: str) -> str | None:
    """What to install before a picture with this ending can be read; None where nothing is missing."""
    if ending_of(name) in HEIF_ENDINGS and importlib.util.find_spec("pillow_heif") is None:
        return f"{name} is HEIF, as phones write it, which needs {HEIF_INSTALL}; or convert it"
    return None


def describe_passed_over(counts: Mapping[str, int]) -> str:
    """One sentence that says how many files were passed over, and why; empty where none was."""
    if not (total := sum(counts.values())):
        return ""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda row: -row[1]))
    return f"{total:,} file{'s' * (total != 1)} passed over: {reasons}"
