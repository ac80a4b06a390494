//! PyTorch's `.pth`/`.pt` files as `torch.save(state_dict)` has written them since 1.6: a zip archive of uncompressed
//! storages and one pickle that says which tensor views which storage. Nothing of the pickle is run.
//!
//! Reads a bare `state_dict` or one inside a checkpoint dict, and strips the `module.` that data-parallel wrappers
//! put before every name.

use std::{collections::HashMap, fs::File, io::Read, path::Path};

use tch::{Kind, Tensor};
use zip::{CompressionMethod, ZipArchive};

pub use super::pytorch_write::write;
use super::{FileError, from_bytes};
use crate::data::pickle::{self, Limits, Object, Value, Values, View};

/// Largest pickle that is read, in bytes; a network's is about 100 bytes a tensor.
const MAX_PICKLE: u64 = 64 << 20;

/// Keys under which checkpoints keep a network.
const NESTED: [&str; 2] = ["state_dict", "state_dict_backbone"];

const ORDERED_DICT: pickle::Allowed = ("collections", "OrderedDict");
const REBUILD_TENSOR: pickle::Allowed = ("torch._utils", "_rebuild_tensor_v2");
const REBUILD_PARAMETER: pickle::Allowed = ("torch._utils", "_rebuild_parameter");

/// PyTorch's storage classes.
pub(super) const STORAGES: [(&str, Kind); 10] = [
    ("FloatStorage", Kind::Float),
    ("DoubleStorage", Kind::Double),
    ("HalfStorage", Kind::Half),
    ("BFloat16Storage", Kind::BFloat16),
    ("LongStorage", Kind::Int64),
    ("IntStorage", Kind::Int),
    ("ShortStorage", Kind::Int16),
    ("CharStorage", Kind::Int8),
    ("ByteStorage", Kind::Uint8),
    ("BoolStorage", Kind::Bool),
];

/// Names and values in the order of the `state_dict`.
pub fn read(path: &Path) -> Result<Vec<(String, Tensor)>, FileError> {
    let file = File::open(path).map_err(FileError::io(path))?;
    let malformed = |what: String| FileError::malformed(path, what);
    let archive = ZipArchive::new(file)
        .map_err(|error| malformed(format!("not a PyTorch archive, or cut off: {error}")))?;
    let mut archive = Archive::new(archive).map_err(malformed)?;
    let pickled = archive.entry("data.pkl", MAX_PICKLE).map_err(malformed)?;
    let allowed = allowed_globals();
    let pickle = pickle::read(&pickled, &allowed, &Limits::default())
        .map_err(|error| malformed(format!("data.pkl: {error}")))?;
    tensors(pickle.root(), &mut archive).map_err(malformed)
}

fn allowed_globals() -> Vec<pickle::Allowed> {
    let storages = STORAGES.iter().map(|(name, _)| ("torch", *name));
    [ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER]
        .into_iter()
        .chain(storages)
        .collect()
}

/// The archive and the storages read so far: several tensors may view one.
struct Archive {
    zip: ZipArchive<File>,
    /// The folder that everything lies in, with its slash.
    root: String,
    storages: HashMap<String, Tensor>,
}

impl Archive {
    fn new(zip: ZipArchive<File>) -> Result<Self, String> {
        let mut root = None;
        for name in zip.file_names() {
            let name = name.map_err(|error| format!("archive entry: {error}"))?;
            if name == "data.pkl" || name.ends_with("/data.pkl") {
                root = Some(name[..name.len() - "data.pkl".len()].to_owned());
            }
        }
        let root = root.ok_or("not a PyTorch archive: it has no data.pkl")?;
        let mut archive = Self {
            zip,
            root,
            storages: HashMap::new(),
        };
        // Absent in files of older versions, which were little-endian on every machine that matters.
        if let Ok(order) = archive.entry("byteorder", 16)
            && order != b"little"
        {
            return Err("values are big-endian, which is not supported".to_owned());
        }
        Ok(archive)
    }

    /// The bytes of an uncompressed entry.
    fn entry(&mut self, name: &str, limit: u64) -> Result<Vec<u8>, String> {
        let full = format!("{}{name}", self.root);
        let entry = self
            .zip
            .by_name(&full)
            .map_err(|error| format!("archive entry {full:?}: {error}"))?;
        if entry.compression() != CompressionMethod::Stored {
            return Err(format!(
                "archive entry {full:?} is compressed, which PyTorch never does"
            ));
        }
        let size = entry.size();
        if size > limit {
            return Err(format!(
                "archive entry {full:?} has {size} bytes, more than {limit}"
            ));
        }
        // Grows with what is really there, whatever the directory claims; the archive compares its checksum when the
        // end is reached, one byte later.
        let mut bytes = Vec::new();
        let read = entry.take(size.saturating_add(1)).read_to_end(&mut bytes);
        read.map_err(|error| format!("archive entry {full:?}: {error}"))?;
        if bytes.len() as u64 != size {
            return Err(format!(
                "archive entry {full:?} is cut off: {} of {size} bytes",
                bytes.len()
            ));
        }
        Ok(bytes)
    }

    /// A storage as a flat tensor.
    fn storage(&mut self, key: &str, kind: Kind) -> Result<Tensor, String> {
        if let Some(known) = self.storages.get(key) {
            return match known.kind() == kind {
                true => Ok(known.shallow_clone()),
                false => Err(format!("storage {key:?} is used with two kinds")),
            };
        }
        let bytes = self.entry(&format!("data/{key}"), u64::MAX)?;
        let elements = (bytes.len() / kind.elt_size_in_bytes()) as i64;
        let storage = from_bytes(&bytes, &[elements], kind)
            .ok_or_else(|| format!("storage {key:?} has {} bytes, not whole {kind:?}s", bytes.len()))?;
        self.storages.insert(key.to_owned(), storage.shallow_clone());
        Ok(storage)
    }
}

/// The tensors of the state_dict in `root`.
fn tensors(root: Value, archive: &mut Archive) -> Result<Vec<(String, Tensor)>, String> {
    let top = items(root).ok_or_else(|| format!("data.pkl holds {}, expected a state_dict", root.kind()))?;
    let nested = NESTED.iter().find_map(|key| {
        let entry = top.pairs().find(|(name, _)| name.text() == Some(key))?;
        items(entry.1)
    });
    let mut tensors = Vec::new();
    for (name, value) in nested.unwrap_or(top).pairs() {
        let name = name
            .text()
            .ok_or_else(|| format!("a key of the state_dict is {}", name.kind()))?;
        let tensor = tensor(value, archive).map_err(|what| format!("key {name:?}: {what}"))?;
        tensors.push((name.strip_prefix("module.").unwrap_or(name).to_owned(), tensor));
    }
    Ok(tensors)
}

/// Keys and values of a dict or an `OrderedDict`.
fn items(value: Value<'_>) -> Option<Values<'_>> {
    match value.view() {
        View::Dict(items) => Some(items),
        View::Object(object) if (object.module, object.name) == ORDERED_DICT => Some(object.items),
        _ => None,
    }
}

fn tensor(value: Value, archive: &mut Archive) -> Result<Tensor, String> {
    let View::Object(object) = value.view() else {
        return Err(format!("expected a tensor, found {}", value.kind()));
    };
    match (object.module, object.name) {
        REBUILD_TENSOR => view_of_storage(object, archive),
        // A parameter wraps its tensor: (tensor, requires_grad, hooks).
        REBUILD_PARAMETER => match object.args.get(0).map(|inner| (inner, inner.view())) {
            Some((inner, View::Object(o))) if (o.module, o.name) == REBUILD_TENSOR => tensor(inner, archive),
            _ => Err("a parameter without a tensor".to_owned()),
        },
        (module, name) => Err(format!("expected a tensor, found an object of {module}.{name}")),
    }
}

/// `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`.
fn view_of_storage(object: Object, archive: &mut Archive) -> Result<Tensor, String> {
    let argument = |i| object.args.get(i).ok_or("a tensor with too few arguments");
    let (key, kind) =
        storage_name(argument(0)?).ok_or("a tensor whose storage is not described as PyTorch does")?;
    let offset = argument(1)?
        .int()
        .filter(|&n| n >= 0)
        .ok_or("a tensor with a bad offset")?;
    let size = sizes(argument(2)?).ok_or("a tensor with a bad size")?;
    let stride = sizes(argument(3)?).ok_or("a tensor with a bad stride")?;
    let storage = archive.storage(key, kind)?;
    let elements = storage.numel() as i64;
    if size.len() != stride.len() || !fits(offset, &size, &stride, elements) {
        return Err(format!(
            "size {size:?}, stride {stride:?}, offset {offset} exceed a storage of {elements} elements"
        ));
    }
    let view = storage.f_as_strided(&size, &stride, offset);
    Ok(view.map_err(|error| one_line(&error))?.contiguous())
}

fn one_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// `("storage", class, key, device, elements)`.
fn storage_name(value: Value<'_>) -> Option<(&str, Kind)> {
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
    let (_, kind) = STORAGES.iter().find(|(name, _)| *name == class)?;
    (tag.text() == Some("storage")).then_some((key.text()?, *kind))
}

fn sizes(value: Value) -> Option<Vec<i64>> {
    let View::Tuple(sizes) = value.view() else {
        return None;
    };
    sizes.iter().map(|n| n.int().filter(|&n| n >= 0)).collect()
}

/// Whether a view stays inside its storage and has no more elements than it (a view that repeats elements could ask
/// for any amount of memory).
fn fits(offset: i64, size: &[i64], stride: &[i64], elements: i64) -> bool {
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

#[cfg(test)]
mod tests;
