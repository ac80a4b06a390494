//! What a PyTorch file says about its tensors: which of its dicts is the network, and which bytes of the file each
//! tensor views. Nothing of the pickle is run, and no memory is taken for values.
//!
//! Knows no tensor type: [`super`] makes tensors of the views.

use std::collections::{HashMap, HashSet};

use ::safetensors::Dtype;

use super::{archive::Archive, legacy};
use crate::data::pickle::{self, Limits, Object, Pickle, PickleError, Value, Values, View};

/// Longest pickle that is read, in bytes; a network's is about 200 bytes a tensor.
pub(super) const MAX_PICKLE: usize = 16 << 20;
/// Most dimensions of a tensor, as in PyTorch.
const MAX_DIMENSIONS: usize = 64;
/// Dicts within dicts that are looked into for the network.
const MAX_DEPTH: usize = 4;
/// Entries beside the network that are named.
const MAX_NAMED: usize = 16;

/// Keys under which checkpoints keep a network, the likeliest first.
pub const NETWORK: [&str; 7] = [
    "state_dict_backbone",
    "state_dict",
    "model_state_dict",
    "backbone",
    "model",
    "network",
    "net",
];
/// The key under which the reference's checkpoints keep a rank's classes.
pub const HEAD: [&str; 1] = ["state_dict_softmax_fc"];
/// What wrappers put before every name: data parallelism, `torch.compile`.
const WRAPPERS: [&str; 2] = ["module.", "_orig_mod."];

const ORDERED_DICT: pickle::Allowed = ("collections", "OrderedDict");
const REBUILD_TENSOR: pickle::Allowed = ("torch._utils", "_rebuild_tensor_v2");
const REBUILD_TENSOR_V1: pickle::Allowed = ("torch._utils", "_rebuild_tensor");
const REBUILD_PARAMETER: pickle::Allowed = ("torch._utils", "_rebuild_parameter");
/// Sizes among the numbers of a checkpoint.
const SIZE: pickle::Allowed = ("torch", "Size");

/// PyTorch's storage classes.
pub(crate) const STORAGES: [(&str, Dtype); 10] = [
    ("FloatStorage", Dtype::F32),
    ("DoubleStorage", Dtype::F64),
    ("HalfStorage", Dtype::F16),
    ("BFloat16Storage", Dtype::BF16),
    ("LongStorage", Dtype::I64),
    ("IntStorage", Dtype::I32),
    ("ShortStorage", Dtype::I16),
    ("CharStorage", Dtype::I8),
    ("ByteStorage", Dtype::U8),
    ("BoolStorage", Dtype::BOOL),
];

/// Why a file gives no tensors.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct Refused {
    /// What is wrong, where.
    pub what: String,
    /// What to do; may be empty.
    pub hint: &'static str,
}

impl From<String> for Refused {
    fn from(what: String) -> Self {
        Self { what, hint: "" }
    }
}

/// The tensors of a network, described.
#[derive(Debug)]
pub struct StateDict<'a> {
    /// Names, without those of wrappers, and views in the order of the file. No name comes twice.
    pub tensors: Vec<(String, TensorView)>,
    /// The storages that they view.
    pub storages: Vec<Storage<'a>>,
    /// What the file holds beside the network, if that was one entry of a checkpoint; the first few keys.
    pub beside: Vec<String>,
}

/// A storage: its values lie in the file.
#[derive(Clone, Copy, Debug)]
pub struct Storage<'a> {
    /// The values, whole elements, little-endian.
    pub bytes: &'a [u8],
    /// What they are.
    pub dtype: Dtype,
}

impl Storage<'_> {
    /// Number of values.
    pub fn elements(&self) -> usize {
        self.bytes.len() / width(self.dtype)
    }
}

/// Which elements of a storage a tensor consists of: all of them are in it, and no more than it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorView {
    /// Index in [`StateDict::storages`].
    pub storage: usize,
    /// First element.
    pub offset: i64,
    /// Sizes, not negative.
    pub size: Vec<i64>,
    /// Elements between neighbours along each dimension, not negative.
    pub stride: Vec<i64>,
}

impl TensorView {
    /// Whether the elements lie one after the other, row major.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        let mut dimensions = self.size.iter().zip(&self.stride).rev();
        dimensions.all(|(&size, &stride)| {
            let fits = size == 1 || stride == expected;
            expected = size.max(1).saturating_mul(expected);
            fits
        })
    }
}

/// Reads a file of `torch.save` in either of its forms. `keys` are those under which a checkpoint may keep what is
/// wanted ([`NETWORK`] or [`HEAD`]).
pub fn read<'a>(file: &'a [u8], keys: &[&str]) -> Result<StateDict<'a>, Refused> {
    if file.starts_with(legacy::MAGIC) {
        let (object, storages) = legacy::read(file)?;
        let bytes = |key: &str| storages.get(key).copied().ok_or_else(|| missing(key));
        return Ok(describe(object.root(), keys, bytes)?);
    }
    let archive = Archive::read(file)?;
    let root = archive.root_of("data.pkl")?;
    let entry = |name: &str| archive.entry(&format!("{root}{name}"));
    // Absent in files of older versions, which were little-endian on every machine that matters.
    if entry("byteorder")?.is_some_and(|order| order != b"little") {
        return Err("values are big-endian, which is not supported".to_owned().into());
    }
    let pickled = entry("data.pkl")?.unwrap_or_default();
    if pickled.len() > MAX_PICKLE {
        let what = format!("data.pkl has {} bytes, more than {MAX_PICKLE}", pickled.len());
        return Err(what.into());
    }
    let pickle = pickle::read(pickled, &allowed_globals(), &limits()).map_err(|error| Refused {
        hint: match error {
            PickleError::ForeignGlobal { .. } => {
                "save model.state_dict() alone, not the model or other objects with it"
            }
            _ => "",
        },
        what: format!("data.pkl: {error}"),
    })?;
    let bytes = |key: &str| entry(&format!("data/{key}"))?.ok_or_else(|| missing(key));
    Ok(describe(pickle.root(), keys, bytes)?)
}

fn missing(key: &str) -> String {
    format!("storage {key:?} is not in the file")
}

/// Bytes of one element.
fn width(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}

pub(super) fn allowed_globals() -> Vec<pickle::Allowed> {
    let storages = STORAGES.iter().map(|(name, _)| ("torch", *name));
    [
        ORDERED_DICT,
        REBUILD_TENSOR,
        REBUILD_TENSOR_V1,
        REBUILD_PARAMETER,
        SIZE,
    ]
    .into_iter()
    .chain(storages)
    .collect()
}

/// What a checkpoint's pickle may cost: 100,000 tensors with their optimizer's state fit.
pub(super) fn limits() -> Limits {
    Limits {
        values: 1 << 20,
        // Python's pickler moves a thousand entries at a time.
        stack: 10_000,
        memo: 1_000_000,
        string: 64 << 10,
    }
}

fn describe<'a>(
    root: Value,
    keys: &[&str],
    bytes: impl Fn(&str) -> Result<&'a [u8], String>,
) -> Result<StateDict<'a>, String> {
    let (entries, beside) = network(root, keys)?;
    let mut storages = Storages {
        known: HashMap::new(),
        list: Vec::new(),
        bytes,
    };
    let mut tensors = Vec::with_capacity(entries.len());
    let mut names = HashSet::new();
    for (key, value) in entries.pairs() {
        let key = key
            .text()
            .ok_or_else(|| format!("a key of the state_dict is {}", key.kind()))?;
        let name = unwrapped(key);
        if !names.insert(name) {
            return Err(format!("key {name:?} comes twice"));
        }
        let view = tensor(value, &mut storages).map_err(|what| format!("key {key:?}: {what}"))?;
        tensors.push((name.to_owned(), view));
    }
    Ok(StateDict {
        tensors,
        storages: storages.list,
        beside,
    })
}

/// A name without what wrappers put before it.
fn unwrapped(mut name: &str) -> &str {
    while let Some(rest) = WRAPPERS.iter().find_map(|wrapper| name.strip_prefix(wrapper)) {
        name = rest;
    }
    name
}

/// The entries of the network, and the keys beside it.
fn network<'p>(root: Value<'p>, keys: &[&str]) -> Result<(Values<'p>, Vec<String>), String> {
    let mut found = items(root).ok_or_else(|| match root.view() {
        View::Object(object) => format!(
            "the file holds an object of {}.{}, expected a state_dict",
            object.module, object.name
        ),
        _ => format!("the file holds {}, expected a state_dict", root.kind()),
    })?;
    let mut beside = Vec::new();
    for _ in 0..MAX_DEPTH {
        let inner = keys.iter().find_map(|key| {
            let (_, value) = found.pairs().find(|(name, _)| name.text() == Some(key))?;
            Some((*key, items(value)?))
        });
        let Some((key, inner)) = inner else { break };
        beside.extend(
            found
                .pairs()
                .filter_map(|(name, _)| name.text())
                .filter(|name| *name != key)
                .take(MAX_NAMED - beside.len().min(MAX_NAMED))
                .map(shown),
        );
        found = inner;
    }
    let holds_dicts = found.pairs().any(|(_, value)| items(value).is_some());
    let holds_tensors = found
        .pairs()
        .any(|(_, value)| matches!(value.view(), View::Object(_)) && items(value).is_none());
    if holds_dicts && !holds_tensors {
        let names: Vec<String> = found
            .pairs()
            .filter_map(|(name, _)| name.text())
            .take(8)
            .map(shown)
            .collect();
        return Err(format!(
            "no network in it: its keys are {}, none of them {}",
            names.join(", "),
            keys.join(", ")
        ));
    }
    Ok((found, beside))
}

/// A key for a message: in one line, and not longer than names are.
fn shown(key: &str) -> String {
    let start: String = key.chars().take(64).collect();
    start.escape_debug().to_string()
}

/// Keys and values of a dict or an `OrderedDict`.
fn items(value: Value<'_>) -> Option<Values<'_>> {
    match value.view() {
        View::Dict(items) => Some(items),
        View::Object(object) if (object.module, object.name) == ORDERED_DICT => Some(object.items),
        _ => None,
    }
}

/// The storages seen so far: several tensors may view one.
struct Storages<'a, F> {
    known: HashMap<String, usize>,
    list: Vec<Storage<'a>>,
    bytes: F,
}

impl<'a, F: Fn(&str) -> Result<&'a [u8], String>> Storages<'a, F> {
    fn index(&mut self, key: &str, dtype: Dtype) -> Result<usize, String> {
        if let Some(&known) = self.known.get(key) {
            return match self.list[known].dtype == dtype {
                true => Ok(known),
                false => Err(format!("storage {key:?} is used with two kinds")),
            };
        }
        let bytes = (self.bytes)(key)?;
        if !bytes.len().is_multiple_of(width(dtype)) {
            return Err(format!(
                "storage {key:?} has {} bytes, not whole {dtype}s",
                bytes.len()
            ));
        }
        self.list.push(Storage { bytes, dtype });
        self.known.insert(key.to_owned(), self.list.len() - 1);
        Ok(self.list.len() - 1)
    }
}

fn tensor<'a, F: Fn(&str) -> Result<&'a [u8], String>>(
    value: Value,
    storages: &mut Storages<'a, F>,
) -> Result<TensorView, String> {
    let View::Object(object) = value.view() else {
        return Err(format!("expected a tensor, found {}", value.kind()));
    };
    match (object.module, object.name) {
        REBUILD_TENSOR | REBUILD_TENSOR_V1 => view_of_storage(object, storages),
        // A parameter wraps its tensor: (tensor, requires_grad, hooks).
        REBUILD_PARAMETER => match object.args.get(0).map(Value::view) {
            Some(View::Object(inner))
                if matches!((inner.module, inner.name), REBUILD_TENSOR | REBUILD_TENSOR_V1) =>
            {
                view_of_storage(inner, storages)
            }
            _ => Err("a parameter without a tensor".to_owned()),
        },
        (module, name) => Err(format!("expected a tensor, found an object of {module}.{name}")),
    }
}

/// `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`; the first version ends with the stride.
fn view_of_storage<'a, F: Fn(&str) -> Result<&'a [u8], String>>(
    object: Object,
    storages: &mut Storages<'a, F>,
) -> Result<TensorView, String> {
    let argument = |i| object.args.get(i).ok_or("a tensor with too few arguments");
    let (key, dtype) =
        storage_name(argument(0)?).ok_or("a tensor whose storage is not described as PyTorch does")?;
    let offset = argument(1)?
        .int()
        .filter(|&n| n >= 0)
        .ok_or("a tensor with a bad offset")?;
    let size = sizes(argument(2)?).ok_or("a tensor with a bad size")?;
    let stride = sizes(argument(3)?).ok_or("a tensor with a bad stride")?;
    let storage = storages.index(key, dtype)?;
    let elements = storages.list[storage].elements() as i64;
    if size.len() != stride.len() || !fits(offset, &size, &stride, elements) {
        return Err(format!(
            "size {size:?}, stride {stride:?}, offset {offset} exceed a storage of {elements} elements"
        ));
    }
    Ok(TensorView {
        storage,
        // A tensor without elements may say that it begins anywhere.
        offset: if size.contains(&0) { 0 } else { offset },
        size,
        stride,
    })
}

/// `("storage", class, key, device, elements)`, and in the older form `None` for a view of another storage.
fn storage_name(value: Value<'_>) -> Option<(&str, Dtype)> {
    let View::Persistent(id) = value.view() else {
        return None;
    };
    let View::Tuple(parts) = id.view() else {
        return None;
    };
    let [tag, class, key, ..] = [parts.get(0)?, parts.get(1)?, parts.get(2)?];
    let View::Global("torch", class) = class.view() else {
        return None;
    };
    if parts
        .get(5)
        .is_some_and(|view| !matches!(view.view(), View::None))
    {
        return None;
    }
    let (_, dtype) = STORAGES.iter().find(|(name, _)| *name == class)?;
    (tag.text() == Some("storage")).then_some((key.text()?, *dtype))
}

fn sizes(value: Value) -> Option<Vec<i64>> {
    let sizes = match value.view() {
        View::Tuple(sizes) => sizes,
        // torch.Size((2, 3))
        View::Object(object) if (object.module, object.name) == SIZE => match object.args.get(0)?.view() {
            View::Tuple(sizes) => sizes,
            _ => return None,
        },
        _ => return None,
    };
    if sizes.len() > MAX_DIMENSIONS {
        return None;
    }
    sizes.iter().map(|n| n.int().filter(|&n| n >= 0)).collect()
}

/// Whether a view stays inside its storage and has no more elements than it (a view that repeats elements could ask
/// for any amount of memory).
pub(super) fn fits(offset: i64, size: &[i64], stride: &[i64], elements: i64) -> bool {
    let Some(count) = size.iter().try_fold(1i64, |n, &d| n.checked_mul(d)) else {
        return false;
    };
    if count == 0 {
        return true;
    }
    let last = size.iter().zip(stride).try_fold(offset, |at, (&size, &stride)| {
        at.checked_add((size - 1).checked_mul(stride)?)
    });
    count <= elements && last.is_some_and(|last| last < elements)
}

/// How wide the elements of each storage are, as its tensors say: the older form does not say it elsewhere.
#[derive(Default)]
pub(super) struct Kinds(HashMap<String, Dtype>);

impl Kinds {
    /// Notes every storage that is named anywhere in `pickle`.
    pub(super) fn collect(&mut self, pickle: &Pickle) -> Result<(), String> {
        for value in pickle.values() {
            if !matches!(value.view(), View::Persistent(_)) {
                continue;
            }
            let (key, dtype) =
                storage_name(value).ok_or("a storage is not described as PyTorch does, or is a view")?;
            match self.0.get(key) {
                Some(known) if *known != dtype => {
                    return Err(format!("storage {key:?} is used with two kinds"));
                }
                Some(_) => {}
                None => {
                    self.0.insert(key.to_owned(), dtype);
                }
            }
        }
        Ok(())
    }

    /// Bytes of an element of a storage.
    pub(super) fn width(&self, key: &str) -> Option<usize> {
        self.0.get(key).map(|dtype| width(*dtype))
    }
}
