"""Rows of tables: parquet, CSV and Arrow files, memory-mapped through `datasets`, with values as in JSON."""

from __future__ import annotations

import csv
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmllm.readers.compression import decoded_copy
from mmllm.readers.files import DataError, LazyImage, RowError, fingerprint, is_url, open_file

_ARROW_MAGIC = b"ARROW1"  # of Arrow's file format, which ends with an index; its stream format has neither
# Arrow has maps and `datasets` has not: in copies for `datasets` a map is a list of pairs with these names.
MAP_KEY, MAP_VALUE = "__map_key__", "__map_value__"


def arrow_to_python(scalar: Any, name: str) -> Any:
    """An Arrow value as JSON would have it. Bytes, which may be a picture, become a LazyImage of this name."""
    import pyarrow as pa

    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.ExtensionScalar | pa.DictionaryScalar | pa.RunEndEncodedScalar | pa.UnionScalar):
        return arrow_to_python(_underlying_scalar(scalar), name)
    if isinstance(scalar, pa.StructScalar):
        return {key: arrow_to_python(value, f"{name}.{key}") for key, value in scalar.items()}
    if isinstance(scalar, pa.ListScalar):  # maps, fixed-size and large lists are subclasses
        return _list_to_python(scalar, name)
    if isinstance(scalar, pa.BinaryScalar) and not isinstance(scalar, pa.StringScalar):
        return LazyImage(name, scalar.as_py)
    if pa.types.is_duration(scalar.type):
        return scalar.value
    if pa.types.is_temporal(scalar.type):  # Python's own dates cannot hold all of them
        scalar = scalar.cast(pa.string())
    try:
        value = scalar.as_py()
    except UnicodeDecodeError as error:
        raise RowError(f"{name} is not UTF-8 text at byte {error.start}; write the table again from UTF-8") from error
    return None if isinstance(value, float) and math.isnan(value) else value


def _underlying_scalar(scalar: Any) -> Any:
    import pyarrow as pa

    # as_py() of a dictionary-encoded value would copy the bytes of a picture
    return scalar.dictionary[scalar.index.as_py()] if isinstance(scalar, pa.DictionaryScalar) else scalar.value


def _list_to_python(scalar: Any, name: str) -> Any:
    import pyarrow as pa

    if scalar.type.value_type in (pa.uint8(), pa.int8()) if not isinstance(scalar, pa.MapScalar) else False:
        return LazyImage(name, functools.partial(_bytes_of, scalar))
    values = scalar.values
    if isinstance(scalar, pa.MapScalar) or _is_map(scalar.type):
        keys, items = values.field(0), values.field(1)
        return {
            str(key.as_py()): arrow_to_python(item, f"{name}.{key.as_py()}")
            for key, item in zip(keys, items, strict=True)
        }
    return [arrow_to_python(value, f"{name}[{number}]") for number, value in enumerate(values)]


def _bytes_of(numbers: Any) -> bytes:
    return bytes(value & 255 for value in numbers.as_py())


def _is_map(list_type: Any) -> bool:
    import pyarrow as pa

    item_type = list_type.value_type
    return pa.types.is_struct(item_type) and [field.name for field in item_type] == [MAP_KEY, MAP_VALUE]


class ArrowRows:
    """A table of `datasets`, memory-mapped."""

    def __init__(self, path: str, dataset: Any):
        self._path, self._dataset = path, dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        table = self._dataset.data.fast_slice(index, 1)
        names = table.column_names
        return {name: arrow_to_python(table.column(name)[0], f"{self._path} row {index} {name}") for name in names}


def _load_with_datasets(builder: str, files: list[str], **options: Any) -> ArrowRows:
    """The rows of files that `datasets` converts, once, into Arrow files in its cache (HF_DATASETS_CACHE)."""
    import datasets
    import pyarrow as pa

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(builder, data_files={"train": files}, split="train", **options)
    except (
        datasets.exceptions.DatasetGenerationError,
        pa.ArrowException,
        UnicodeError,
        ValueError,
        TypeError,
    ) as error:
        name = files[0] if len(files) == 1 else f"one of {files[0]} and {len(files) - 1} more"
        raise DataError(f"{name} cannot be read as {builder}: {error.__cause__ or error}") from error
    return ArrowRows(files[0], dataset)


def open_parquet(path: str) -> Any:
    """A pyarrow ParquetFile. Raises DataError for a file that is not parquet."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return pa.parquet.ParquetFile(open_file(path))
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


def parquet_rows(files: list[str]) -> ArrowRows:
    """Rows of parquet files. Raises DataError where their columns differ."""
    schemas, num_rows = [], []
    for path in files:
        with open_parquet(path) as file:
            schemas.append(file.schema_arrow)
            num_rows.append(file.metadata.num_rows)
    for path, schema in zip(files, schemas, strict=True):
        if set(schema.names) != set(schemas[0].names):
            differing = ", ".join(sorted(set(schema.names) ^ set(schemas[0].names)))
            raise DataError(
                f"{path} has other columns than {files[0]} ({differing}); make each a source of its own, or write "
                "them with the same columns"
            )
    if not any(num_rows):
        raise DataError(f"{files[0]} holds no rows; give a file with at least one conversation")
    if all(_is_supported_type(field.type) for schema in schemas for field in schema):
        return _load_with_datasets("parquet", files)
    return _arrow_copy(files, _parquet_batches)


@contextmanager
def _parquet_batches(path: str) -> Iterator[tuple[Any, Iterable[Any]]]:
    """(schema, record batches) of a parquet file."""
    with open_parquet(path) as file:
        yield file.schema_arrow, file.iter_batches(batch_size=256)


@contextmanager
def _arrow_batches(path: str) -> Iterator[tuple[Any, Iterable[Any]]]:
    """(schema, record batches) of a file in Arrow's file format, which pandas and polars write."""
    import pyarrow as pa

    with pa.memory_map(path) as source, pa.ipc.open_file(source) as file:
        yield file.schema, (file.get_batch(number) for number in range(file.num_record_batches))


def _is_supported_type(type_: Any) -> bool:
    """Whether `datasets` supports this type of Arrow."""
    from datasets.features.features import generate_from_arrow_type

    try:
        generate_from_arrow_type(type_)
    except (ValueError, NotImplementedError):
        return False
    return True


def _arrow_copy(files: list[str], open_table: Callable[[str], Any]) -> ArrowRows:
    """Rows of tables with types that `datasets` lacks, through copies in its cache that use types which it has.

    `open_table(path)` is a context manager that gives (schema, record batches).
    """
    import datasets
    import pyarrow as pa

    parts = []
    for path in files:
        copy = Path(datasets.config.HF_DATASETS_CACHE) / "mmllm" / f"{fingerprint([path])}.arrow"
        if not copy.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            partial = copy.with_suffix(f".{os.getpid()}.part")
            try:
                with open_table(path) as (old, batches):
                    schema = pa.schema([(field.name, _supported_type(field.type)) for field in old])
                    with pa.ipc.new_stream(str(partial), schema) as out:
                        for batch in batches:
                            columns = [_cast_column(batch.column(field.name), field.type) for field in schema]
                            out.write_batch(pa.record_batch(columns, schema=schema))
                partial.replace(copy)
            except pa.ArrowException as error:
                raise DataError(f"{path} has a column that cannot be read: {error}") from error
            finally:
                partial.unlink(missing_ok=True)
        parts.append(datasets.Dataset.from_file(str(copy)))
    return ArrowRows(files[0], datasets.concatenate_datasets(parts))


def _supported_type(type_: Any) -> Any:
    """The type of `datasets` that replaces one of Arrow: a list of pairs for a map, text where there is no other."""
    import pyarrow as pa

    if pa.types.is_map(type_):
        pair = [(MAP_KEY, _supported_type(type_.key_type)), (MAP_VALUE, _supported_type(type_.item_type))]
        return pa.list_(pa.struct(pair))
    if pa.types.is_struct(type_):
        return pa.struct([(field.name, _supported_type(field.type)) for field in type_])
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        return pa.list_(_supported_type(type_.value_type))
    if pa.types.is_dictionary(type_):
        return _supported_type(type_.value_type)
    if pa.types.is_fixed_size_binary(type_) or type_ == pa.binary_view():
        return pa.binary()
    return type_ if _is_supported_type(type_) else pa.string()


def _cast_column(column: Any, type_: Any) -> Any:
    import pyarrow as pa

    if column.type == type_:
        return column
    return pa.array([_with_map_pairs(value, type_) for value in column.to_pylist()], type_)


def _with_map_pairs(value: Any, type_: Any) -> Any:
    """A Python value of a column, its maps as the lists of pairs that `_supported_type` makes of them."""
    import pyarrow as pa

    if value is None:
        return None
    if pa.types.is_struct(type_):
        return {field.name: _with_map_pairs(value[field.name], field.type) for field in type_}
    if pa.types.is_list(type_) and _is_map(type_):
        pair_type = type_.value_type
        return [
            {MAP_KEY: _with_map_pairs(k, pair_type[0].type), MAP_VALUE: _with_map_pairs(v, pair_type[1].type)}
            for k, v in value
        ]
    if pa.types.is_list(type_):
        return [_with_map_pairs(item, type_.value_type) for item in value]
    return str(value) if pa.types.is_string(type_) else value


# CSV


def csv_rows(files: list[str], delimiter: str | None = None) -> ArrowRows:
    """Rows of CSV, every value as its text: 007, NA, True and null are not converted."""
    import datasets

    copies = [decoded_copy(path) for path in files]
    heads = [_csv_head(path, copy, delimiter) for path, copy in zip(files, copies, strict=True)]
    names, delimiter, _ = heads[0]
    if not any(has_rows for _, _, has_rows in heads):
        raise DataError(f"{files[0]} holds no rows; give a file with at least one conversation")
    for path, head in zip(files, heads, strict=True):
        if head[:2] != heads[0][:2]:
            raise DataError(f"{path} has the columns {', '.join(head[0])}, but {files[0]} has {', '.join(names)}")
    features = datasets.Features({name: datasets.Value("string") for name in names})
    rows = _load_with_datasets("csv", copies, features=features, names=names, header=0, sep=delimiter,
                 keep_default_na=False, na_filter=False, encoding="utf-8-sig")  # fmt: skip
    return CsvRows(files[0], rows)


class CsvRows(ArrowRows):
    """Rows whose empty cells are null, since CSV has no other way to leave a value out."""

    def __init__(self, path: str, rows: ArrowRows):
        super().__init__(path, rows._dataset)

    def __getitem__(self, index: int) -> Any:
        return {name: value if value != "" else None for name, value in super().__getitem__(index).items()}


def _csv_head(path: str, copy: str, delimiter: str | None) -> tuple[list[str], str, bool]:
    """(column names, delimiter, whether rows follow). Raises DataError for text that is not UTF-8."""
    with open_file(copy) as file:
        number = 1
        try:
            first = file.readline().decode("utf-8-sig")
            for number, line in enumerate(file, start=2):  # noqa: B007
                line.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 text in line {number}; save it as CSV UTF-8, or run "
                "`iconv -f cp1252 -t utf-8` where it comes from Windows"
            ) from error
    if delimiter is None:  # where numbers have a comma, spreadsheets write another delimiter
        delimiter = max(",;\t|", key=first.count)
    names = next(csv.reader([first], delimiter=delimiter), [])
    names = [name or f"column_{number}" for number, name in enumerate(names)]  # pandas writes its index without a name
    if len(set(names)) != len(names):
        raise DataError(f"the first line of {path} must give each column a name of its own; got {', '.join(names)}")
    return names, delimiter, number > 1


# Arrow files


def arrow_rows(files: list[str]) -> ArrowRows:
    """Rows of Arrow files: those that `datasets` writes, and those that pandas and polars call feather or IPC."""
    import datasets
    import pyarrow as pa

    if any(map(is_url, files)):
        raise DataError(f"{files[0]} is a remote .arrow file, which cannot be memory-mapped: copy it to a local disk")
    try:
        with open_file(files[0]) as file:
            is_file_format = file.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
        if is_file_format:
            return _arrow_copy(files, _arrow_batches)
        parts = [datasets.Dataset.from_file(path) for path in files]
        return ArrowRows(files[0], datasets.concatenate_datasets(parts))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{files[0]} cannot be read as an Arrow stream that `datasets` wrote: {error}") from error


def saved_dataset(folder: str) -> ArrowRows:
    """Rows of a folder that `save_to_disk` of `datasets` wrote."""
    import datasets

    dataset = datasets.load_from_disk(folder)
    if isinstance(dataset, datasets.DatasetDict):
        splits = ", ".join(dataset)
        raise DataError(f"{folder} holds the splits {splits}; give the folder of one, such as {folder}/train")
    return ArrowRows(folder, dataset)


def batches_of_group(path: str, group: int, rows_at_once: int) -> Iterator[Any]:
    """Record batches of a row group, with all columns. Raises DataError where one cannot be read."""
    import pyarrow as pa

    with open_parquet(path) as file:
        try:
            yield from file.iter_batches(batch_size=rows_at_once, row_groups=[group])
        except pa.ArrowException as error:
            raise DataError(f"{path} cannot be read to its end: {error}") from error
