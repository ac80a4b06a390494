//! Safetensors files: a JSON header with names, kinds, shapes and byte ranges, then the values.
//!
//! A reader believes nothing: the header is bounded, its ranges must cover the file exactly, and no memory is taken
//! before the file is known to hold that much.

use std::{
    collections::HashMap,
    fs::File,
    io::{BufReader, BufWriter, Read, Write},
    path::Path,
};

use ::safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use tch::{Kind, Tensor};

use super::{FileError, atomic, bytes, from_bytes};

/// Longest header that is read, in bytes: the format's own limit.
const MAX_HEADER: u64 = 100_000_000;

/// The tensors of a file.
#[derive(Debug)]
pub struct Content {
    /// Names and values in the order of the file.
    pub tensors: Vec<(String, Tensor)>,
    /// The header's free-form texts.
    pub metadata: HashMap<String, String>,
}

impl Content {
    /// A tensor by name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, tensor)| tensor)
    }
}

/// Reads a whole file.
pub fn read(path: &Path) -> Result<Content, FileError> {
    let file = File::open(path).map_err(FileError::io(path))?;
    let length = file.metadata().map_err(FileError::io(path))?.len();
    let mut file = BufReader::new(file);
    let header = read_header(path, &mut file, length)?;
    let mut tensors = Vec::new();
    let mut buffer = Vec::new();
    for name in header.offset_keys() {
        let Some(info) = header.info(&name) else {
            return Err(FileError::malformed(
                path,
                format!("header has no entry for {name:?}"),
            ));
        };
        // Within the file: the header's ranges were checked to follow each other up to its end.
        let (start, end) = info.data_offsets;
        buffer.resize(end - start, 0);
        file.read_exact(&mut buffer).map_err(FileError::io(path))?;
        let tensor = decode(info, &buffer).ok_or_else(|| {
            FileError::malformed(
                path,
                format!("tensor {name:?}: kind {} is not supported", info.dtype),
            )
        })?;
        tensors.push((name, tensor));
    }
    Ok(Content {
        tensors,
        metadata: header.metadata().clone().unwrap_or_default(),
    })
}

fn read_header(path: &Path, file: &mut impl Read, length: u64) -> Result<Metadata, FileError> {
    let malformed = |what: String| FileError::malformed(path, what);
    let mut size = [0; 8];
    if length < 8 {
        return Err(malformed(format!(
            "not a safetensors file: it has {length} bytes"
        )));
    }
    file.read_exact(&mut size).map_err(FileError::io(path))?;
    let size = u64::from_le_bytes(size);
    if size > MAX_HEADER || size > length - 8 {
        return Err(malformed(format!(
            "not a safetensors file, or cut off: the header claims {size} bytes, the file has {length}"
        )));
    }
    let mut header = vec![0; size as usize];
    file.read_exact(&mut header).map_err(FileError::io(path))?;
    // Deserialising checks that ranges follow each other without gaps and agree with kinds and shapes.
    let header: Metadata =
        serde_json::from_slice(&header).map_err(|error| malformed(format!("safetensors header: {error}")))?;
    let expected = (header.data_len() as u64).checked_add(8 + size);
    if expected != Some(length) {
        return Err(malformed(format!(
            "safetensors data is cut off or too long: the header describes {} bytes, the file holds {}",
            header.data_len(),
            length - 8 - size
        )));
    }
    Ok(header)
}

fn decode(info: &TensorInfo, bytes: &[u8]) -> Option<Tensor> {
    let shape: Option<Vec<i64>> = info.shape.iter().map(|&n| i64::try_from(n).ok()).collect();
    from_bytes(bytes, &shape?, kind(info.dtype)?)
}

/// Kinds that both sides know.
const KINDS: [(Dtype, Kind); 10] = [
    (Dtype::F32, Kind::Float),
    (Dtype::F64, Kind::Double),
    (Dtype::F16, Kind::Half),
    (Dtype::BF16, Kind::BFloat16),
    (Dtype::I64, Kind::Int64),
    (Dtype::I32, Kind::Int),
    (Dtype::I16, Kind::Int16),
    (Dtype::I8, Kind::Int8),
    (Dtype::U8, Kind::Uint8),
    (Dtype::BOOL, Kind::Bool),
];

fn kind(dtype: Dtype) -> Option<Kind> {
    KINDS.iter().find(|(d, _)| *d == dtype).map(|(_, kind)| *kind)
}

/// Writes tensors of any of the usual kinds, atomically. The file lists them by kind, then name.
pub fn write<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
) -> Result<(), FileError> {
    write_with(path, tensors, HashMap::new())
}

/// The same with free-form texts in the header.
pub fn write_with<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    metadata: HashMap<String, String>,
) -> Result<(), FileError> {
    let mut named = Vec::new();
    for (name, tensor) in tensors {
        let Some((dtype, _)) = KINDS.iter().find(|(_, kind)| *kind == tensor.kind()) else {
            let what = format!("tensor {name:?}: kind {:?} cannot be written", tensor.kind());
            return Err(FileError::malformed(path, what));
        };
        named.push((name, tensor, *dtype));
    }
    // Wide kinds first keeps every tensor aligned; then by name, so that equal content gives equal files.
    named.sort_by(|(a, _, x), (b, _, y)| y.cmp(x).then(a.cmp(b)));
    let header = header(path, &named, metadata)?;
    atomic::write(path, |file| {
        let mut out = BufWriter::new(file);
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for (_, tensor, _) in &named {
            out.write_all(&bytes(tensor))?;
        }
        out.flush()
    })
}

/// The header's JSON, padded with spaces to a multiple of 8 bytes.
fn header(
    path: &Path,
    named: &[(&str, &Tensor, Dtype)],
    metadata: HashMap<String, String>,
) -> Result<Vec<u8>, FileError> {
    let mut offset = 0;
    let infos = named.iter().map(|(name, tensor, dtype)| {
        let start = offset;
        offset += tensor.numel() * tensor.kind().elt_size_in_bytes();
        let info = TensorInfo {
            dtype: *dtype,
            shape: tensor.size().iter().map(|&n| n as usize).collect(),
            data_offsets: (start, offset),
        };
        ((*name).to_owned(), info)
    });
    let metadata = (!metadata.is_empty()).then_some(metadata);
    let malformed = |what: String| FileError::malformed(path, what);
    let header = Metadata::new(metadata, infos.collect()).map_err(|error| malformed(error.to_string()))?;
    let mut json = serde_json::to_vec(&header).map_err(|error| malformed(error.to_string()))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok(json)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn sample() -> Vec<(&'static str, Tensor)> {
        let values = Tensor::arange(12, (Kind::Float, Device::Cpu)).view([3, 4]);
        vec![
            ("transposed", values.tr()),
            ("half", values.to_kind(Kind::Half)),
            ("brain", values.to_kind(Kind::BFloat16)),
            ("count", Tensor::from(7i64)),
            ("empty", Tensor::zeros([0, 5], (Kind::Float, Device::Cpu))),
            ("values", values),
        ]
    }

    fn written() -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let sample = sample();
        let metadata = HashMap::from([("images".to_owned(), "[]".to_owned())]);
        write_with(&path, sample.iter().map(|(n, t)| (*n, t)), metadata).unwrap();
        (folder, path)
    }

    #[test]
    fn what_is_written_is_read() {
        let (_folder, path) = written();
        let content = read(&path).unwrap();
        assert_eq!(content.tensors.len(), sample().len());
        assert_eq!(content.metadata["images"], "[]");
        for (name, tensor) in sample() {
            let read = content.get(name).unwrap();
            assert_eq!(
                (read.size(), read.kind()),
                (tensor.size(), tensor.kind()),
                "{name}"
            );
            assert_eq!(read, &tensor, "{name}");
        }
        // The format's own crate agrees.
        let bytes = std::fs::read(&path).unwrap();
        let other = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(other.tensor("transposed").unwrap().shape(), [4, 3]);
    }

    #[test]
    fn damaged_files_are_refused() {
        let (folder, path) = written();
        let good = std::fs::read(&path).unwrap();
        let bad = folder.path().join("bad.safetensors");
        for cut in [0, 3, 8, 20, good.len() - 1] {
            std::fs::write(&bad, &good[..cut]).unwrap();
            let error = read(&bad).unwrap_err().to_string();
            assert!(error.contains("bad.safetensors"), "{error}");
        }
        let lies = [
            r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}"#,
            r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,1600000000000]}}"#,
            r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}"#,
            r#"{"a":{"dtype":"C64","shape":[2],"data_offsets":[0,16]}}"#,
        ];
        for header in lies {
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend([0; 16]);
            std::fs::write(&bad, bytes).unwrap();
            assert!(read(&bad).is_err(), "{header}");
        }
        std::fs::write(&bad, [0xff; 64]).unwrap();
        assert!(read(&bad).unwrap_err().to_string().contains("header claims"));
    }
}
