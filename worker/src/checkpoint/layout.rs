//! How tensors lie in a part: the safetensors header, and which kinds are stored.

use safetensors::{Dtype, tensor::Metadata, tensor::TensorInfo};
use std::collections::HashMap;
use tch::{Kind, Tensor};

/// Largest header that is read, in bytes; ours are under 1 MiB.
pub(super) const MAX_HEADER: u64 = 16 << 20;

/// Bytes moved at a time between tensors and files.
pub(super) const CHUNK: usize = 4 << 20;

const KINDS: [(Kind, Dtype); 10] = [
    (Kind::Float, Dtype::F32),
    (Kind::Double, Dtype::F64),
    (Kind::Half, Dtype::F16),
    (Kind::BFloat16, Dtype::BF16),
    (Kind::Int64, Dtype::I64),
    (Kind::Int, Dtype::I32),
    (Kind::Int16, Dtype::I16),
    (Kind::Int8, Dtype::I8),
    (Kind::Uint8, Dtype::U8),
    (Kind::Bool, Dtype::BOOL),
];

pub(super) fn dtype_of(kind: Kind) -> Option<Dtype> {
    KINDS.iter().find(|(k, _)| *k == kind).map(|(_, dtype)| *dtype)
}

pub(super) fn kind_of(dtype: Dtype) -> Option<Kind> {
    KINDS.iter().find(|(_, d)| *d == dtype).map(|(kind, _)| *kind)
}

/// The file's beginning: length of the header, then the header, padded so that the data is aligned to 8 bytes.
/// `tensors` are given in the order of their data.
pub(super) fn header(
    tensors: &[(&str, &Tensor, Dtype)],
    metadata: HashMap<String, String>,
) -> Result<Vec<u8>, String> {
    let mut offset = 0;
    let mut infos = Vec::with_capacity(tensors.len());
    for (name, tensor, dtype) in tensors {
        let end = offset + tensor.numel() * dtype.bitsize() / 8;
        infos.push((
            (*name).to_owned(),
            TensorInfo {
                dtype: *dtype,
                shape: tensor.size().iter().map(|&n| n as usize).collect(),
                data_offsets: (offset, end),
            },
        ));
        offset = end;
    }
    let metadata = Metadata::new(Some(metadata), infos).map_err(|error| error.to_string())?;
    let mut json = serde_json::to_vec(&metadata).map_err(|error| error.to_string())?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut out = (json.len() as u64).to_le_bytes().to_vec();
    out.extend(json);
    Ok(out)
}

/// A tensor of a part, by its place in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) shape: Vec<i64>,
    /// First byte, from the start of the file.
    pub(super) start: u64,
    /// Bytes.
    pub(super) len: u64,
}

impl Stored {
    /// Bytes of one row along the first dimension; `rows` is its size.
    pub(super) fn row_bytes(&self, rows: u64) -> u64 {
        self.len.checked_div(rows).unwrap_or(0)
    }
}

/// The tensors that a header names, in the order of their data. `file_bytes` is the size of the whole file.
pub(super) fn parse(header: &[u8], file_bytes: u64) -> Result<Vec<Stored>, String> {
    let metadata: Metadata = serde_json::from_slice(header).map_err(|error| format!("header: {error}"))?;
    let data_start = 8 + header.len() as u64;
    if data_start + metadata.data_len() as u64 != file_bytes {
        return Err("the header does not describe the file's size".into());
    }
    let names = metadata.offset_keys();
    let stored = names.into_iter().map(|name| {
        let info = metadata.info(&name).ok_or("the header names a tensor twice")?;
        let kind =
            kind_of(info.dtype).ok_or_else(|| format!("tensor {name}: kind {:?} is not read", info.dtype))?;
        let shape: Result<Vec<i64>, _> = info.shape.iter().map(|&n| i64::try_from(n)).collect();
        let (start, end) = info.data_offsets;
        Ok(Stored {
            kind,
            shape: shape.map_err(|_| format!("tensor {name}: its shape is too large"))?,
            start: data_start + start as u64,
            len: (end - start) as u64,
            name,
        })
    });
    stored.collect()
}
