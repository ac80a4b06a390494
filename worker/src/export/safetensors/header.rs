//! The header of a safetensors file: JSON with each tensor's kind, shape and range of bytes. The one reader and writer of
//! it, for weights and for checkpoints. The reader believes nothing: no name comes twice, every range has exactly the bytes
//! that kind and shape need, and together they cover the data once.
//!
//! Knows no tensor type.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
};

use ::safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use serde::{Deserialize, Deserializer, de};

/// Longest header that is read, in bytes: 100,000 tensors.
pub const MAX_HEADER: u64 = 16 << 20;
/// The entry of free-form texts.
const METADATA: &str = "__metadata__";

/// A file's header.
#[derive(Debug)]
pub struct Header {
    /// The tensors in the order of their data, which they cover without gaps.
    pub tensors: Vec<Described>,
    /// Free-form texts.
    pub metadata: HashMap<String, String>,
    /// Where the data begins in the file.
    pub data: usize,
}

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// Its name.
    pub name: String,
    /// What its numbers are.
    pub dtype: Dtype,
    /// Its shape; the product fits.
    pub shape: Vec<i64>,
    /// First byte, from the start of the data.
    pub start: usize,
    /// One past its last byte.
    pub end: usize,
}

/// True if a file that begins with these bytes may be meant as safetensors: a length, then the brace of the header.
pub fn looks_like(start: &[u8]) -> bool {
    start.get(8) == Some(&b'{')
}

/// Reads the header at the start of `file`, which must be `length` bytes long with all of its data.
pub fn read(file: &[u8], length: u64) -> Result<Header, String> {
    let Some((size, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!("not a safetensors file: it has {length} bytes"));
    };
    let size = u64::from_le_bytes(*size);
    if size > length.saturating_sub(8) {
        return Err(format!(
            "not a safetensors file, or cut off: the header claims {size} bytes, the file has {length}"
        ));
    }
    if size > MAX_HEADER {
        return Err(format!(
            "safetensors header of {size} bytes is longer than {MAX_HEADER}"
        ));
    }
    let json = rest
        .get(..size as usize)
        .ok_or("safetensors header: it is not all there")?;
    let entries: Entries =
        serde_json::from_slice(json).map_err(|error| format!("safetensors header: {error}"))?;
    let mut tensors = entries
        .tensors
        .into_iter()
        .map(|(name, info)| info.checked(name))
        .collect::<Result<Vec<Described>, String>>()?;
    tensors.sort_by(|a, b| (a.start, a.end, &a.name).cmp(&(b.start, b.end, &b.name)));
    let mut end = 0;
    for tensor in &tensors {
        if tensor.start != end {
            let what = if tensor.start > end {
                "a hole before"
            } else {
                "an overlap with"
            };
            return Err(format!(
                "safetensors header: tensor {:?} begins at {}, the one before it ends at {end}: {what} it",
                tensor.name, tensor.start
            ));
        }
        end = tensor.end;
    }
    let held = length - 8 - size;
    if end as u64 != held {
        return Err(format!(
            "safetensors data is cut off or too long: the header describes {end} bytes, the file holds {held}"
        ));
    }
    Ok(Header {
        tensors,
        metadata: entries.metadata,
        data: 8 + size as usize,
    })
}

/// The start of a file: the header's length and the header, padded so that the data is aligned to 8 bytes. Tensors are
/// name, shape and kind, in the order of their data.
pub fn write(
    tensors: impl IntoIterator<Item = (String, Vec<usize>, Dtype)>,
    metadata: HashMap<String, String>,
) -> Result<Vec<u8>, String> {
    let mut offset = 0;
    let infos = tensors.into_iter().map(|(name, shape, dtype)| {
        let start = offset;
        offset += shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let info = TensorInfo {
            dtype,
            shape,
            data_offsets: (start, offset),
        };
        (name, info)
    });
    let metadata = (!metadata.is_empty()).then_some(metadata);
    let header = Metadata::new(metadata, infos.collect()).map_err(|error| error.to_string())?;
    let mut json = serde_json::to_vec(&header).map_err(|error| error.to_string())?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut start = (json.len() as u64).to_le_bytes().to_vec();
    start.extend(json);
    Ok(start)
}

/// The header as written.
struct Entries {
    tensors: BTreeMap<String, Info>,
    metadata: HashMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Info {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl Info {
    fn checked(self, name: String) -> Result<Described, String> {
        let (start, end) = self.data_offsets;
        let elements = self.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let bits = elements.and_then(|n| n.checked_mul(self.dtype.bitsize()));
        let shape = self.shape.iter().map(|&n| i64::try_from(n).ok()).collect();
        match (bits, shape) {
            (Some(bits), Some(shape)) if start <= end && bits % 8 == 0 && bits / 8 == end - start => {
                Ok(Described {
                    name,
                    dtype: self.dtype,
                    shape,
                    start,
                    end,
                })
            }
            _ => Err(format!(
                "safetensors header: tensor {name:?}: {} {:?} does not have the bytes {start}..{end}",
                self.dtype, self.shape
            )),
        }
    }
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// Reads entry by entry, so that a name that comes twice is seen.
        struct Visitor;

        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors by name")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Entries {
                    tensors: BTreeMap::new(),
                    metadata: HashMap::new(),
                };
                let mut has_metadata = false;
                while let Some(name) = map.next_key::<String>()? {
                    let twice = || de::Error::custom(format_args!("{name:?} comes twice"));
                    if name == METADATA {
                        entries.metadata = map.next_value()?;
                        if std::mem::replace(&mut has_metadata, true) {
                            return Err(twice());
                        }
                        continue;
                    }
                    if entries.tensors.contains_key(&name) {
                        return Err(twice());
                    }
                    let info = map.next_value()?;
                    entries.tensors.insert(name, info);
                }
                Ok(entries)
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}
