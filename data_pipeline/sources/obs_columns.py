"""Arrow columns of what is known of cells, brought to the types that `Source.obs` promises."""
import pyarrow as pa
import pyarrow.compute as pc


def is_plain(kind: pa.DataType) -> bool:
    """Whether a column of this type says one thing of a cell: text, a number, a truth value, a time."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return not (pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
                or pa.types.is_null(kind) or isinstance(kind, pa.BaseExtensionType))


def plain(values: pa.Array) -> pa.Array:
    """Categories as dictionary<int32, string>, else string, numbers or booleans; NaN is a missing value."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        if pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type):
            return values.cast(pa.dictionary(pa.int32(), pa.string()))
        return plain(values.dictionary_decode())
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return values
    if pa.types.is_floating(kind):
        return pc.if_else(pc.is_nan(values), None, values)
    return values.cast(pa.string())
