//! The names that a checkpoint may call, and what that makes. A name that is only mentioned does no harm and is not
//! looked up here: pytorch-lightning uses its classes as keys of dictionaries.

use safetensors::Dtype;

use super::value::Name;

/// What calling an allowed name makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `torch._utils._rebuild_tensor_v2` and its like: storage, offset, shape, strides, …
    Tensor,
    /// The same of a storage without a format: …, format.
    TensorOfBytes,
    /// The first argument, which is a tensor.
    Parameter,
    /// A function of this list, a type, its arguments.
    Wrapped,
    /// `collections.OrderedDict`: nothing, or pairs.
    Dict,
    /// Data that is not looked at.
    Inert,
}

/// Plain data beside the tensors of published checkpoints: numbers of numpy, settings of the training.
const INERT: [(&str, &[&str]); 17] = [
    ("numpy", &["dtype", "ndarray"]),
    ("numpy.core.multiarray", &["scalar", "_reconstruct"]),
    ("numpy._core.multiarray", &["scalar", "_reconstruct"]),
    ("_codecs", &["encode"]),
    (
        "__builtin__",
        &[
            "set",
            "frozenset",
            "dict",
            "list",
            "tuple",
            "bytearray",
            "complex",
            "slice",
            "range",
        ],
    ),
    (
        "builtins",
        &[
            "set",
            "frozenset",
            "dict",
            "list",
            "tuple",
            "bytearray",
            "complex",
            "slice",
            "range",
        ],
    ),
    ("collections", &["defaultdict", "Counter", "deque"]),
    ("torch", &["Size", "device"]),
    ("argparse", &["Namespace"]),
    (
        "pathlib",
        &[
            "Path",
            "PosixPath",
            "PurePosixPath",
            "WindowsPath",
            "PureWindowsPath",
        ],
    ),
    ("datetime", &["datetime", "date", "timedelta"]),
    ("pytorch_lightning.utilities.parsing", &["AttributeDict"]),
    ("lightning_fabric.utilities.data", &["AttributeDict"]),
    ("omegaconf.dictconfig", &["DictConfig"]),
    ("omegaconf.listconfig", &["ListConfig"]),
    ("omegaconf.base", &["ContainerMetadata", "Metadata"]),
    (
        "omegaconf.nodes",
        &[
            "AnyNode",
            "StringNode",
            "IntegerNode",
            "FloatNode",
            "BooleanNode",
        ],
    ),
];

/// What calling a name makes; `None` for one that must not be called.
pub fn call(name: Name<'_>) -> Option<Call> {
    let Name { module, name } = name;
    let inert = || {
        let mut known = INERT.iter().filter(|(of, _)| *of == module);
        known.any(|(_, names)| names.contains(&name))
    };
    match (module, name) {
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Some(Call::Tensor),
        ("torch._utils", "_rebuild_tensor_v3") => Some(Call::TensorOfBytes),
        ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
            Some(Call::Parameter)
        }
        ("torch._tensor", "_rebuild_from_type_v2") => Some(Call::Wrapped),
        ("collections", "OrderedDict") => Some(Call::Dict),
        _ => inert().then_some(Call::Inert),
    }
}

/// What a class of storages is made of: `Some(None)` for bytes, `None` for a class that is not known.
pub fn storage(name: Name<'_>) -> Option<Option<Dtype>> {
    let dtype = match (name.module, name.name) {
        ("torch" | "torch.storage", "UntypedStorage" | "_UntypedStorage") => return Some(None),
        ("torch" | "torch.cuda", class) => class.strip_suffix("Storage")?,
        _ => return None,
    };
    Some(Some(match dtype {
        "Double" => Dtype::F64,
        "Float" => Dtype::F32,
        "Half" => Dtype::F16,
        "BFloat16" => Dtype::BF16,
        "Long" => Dtype::I64,
        "Int" => Dtype::I32,
        "Short" => Dtype::I16,
        "Char" => Dtype::I8,
        "Byte" => Dtype::U8,
        "Bool" => Dtype::BOOL,
        _ => return None,
    }))
}

/// A number format by its name in torch.
pub fn dtype(name: Name<'_>) -> Option<Dtype> {
    if name.module != "torch" {
        return None;
    }
    Some(match name.name {
        "float64" => Dtype::F64,
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "float8_e4m3fn" => Dtype::F8_E4M3,
        "float8_e5m2" => Dtype::F8_E5M2,
        "int64" => Dtype::I64,
        "int32" => Dtype::I32,
        "int16" => Dtype::I16,
        "int8" => Dtype::I8,
        "uint8" => Dtype::U8,
        "uint16" => Dtype::U16,
        "uint32" => Dtype::U32,
        "uint64" => Dtype::U64,
        "bool" => Dtype::BOOL,
        _ => return None,
    })
}
