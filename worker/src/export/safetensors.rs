//! Safetensors files: a JSON header with names, kinds, shapes and byte ranges, then the values.
//!
//! A reader believes nothing: the header is bounded, its ranges must cover the file exactly, and no memory is taken
//! before the file is known to hold that much.

pub mod header;

use std::{
    collections::HashMap,
    io::{BufWriter, Write},
    path::Path,
};

use tch::Tensor;

use super::{FileError, atomic, bytes, dtype_of, from_bytes, kind_of};
use crate::data::{Access, MappedFile};

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
    let file = MappedFile::open(path, Access::Sequential).map_err(FileError::io(path))?;
    let malformed = |what: String| FileError::malformed(path, what);
    let header = header::read(&file, file.len() as u64).map_err(malformed)?;
    let data = &file[header.data..];
    let tensors = header.tensors.into_iter().map(|described| {
        // Within the file: the ranges were checked to follow each other up to its end.
        let values = &data[described.start..described.end];
        let tensor = kind_of(described.dtype).and_then(|kind| from_bytes(values, &described.shape, kind));
        match tensor {
            Some(tensor) => Ok((described.name, tensor)),
            None => Err(malformed(format!(
                "tensor {:?}: kind {} is not supported",
                described.name, described.dtype
            ))),
        }
    });
    Ok(Content {
        tensors: tensors.collect::<Result<_, _>>()?,
        metadata: header.metadata,
    })
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
        let Some(dtype) = dtype_of(tensor.kind()) else {
            let what = format!("tensor {name:?}: kind {:?} cannot be written", tensor.kind());
            return Err(FileError::malformed(path, what));
        };
        named.push((name, tensor, dtype));
    }
    // Wide kinds first keeps every tensor aligned; then by name, so that equal content gives equal files.
    named.sort_by(|(a, _, x), (b, _, y)| y.cmp(x).then(a.cmp(b)));
    let described = named.iter().map(|(name, tensor, dtype)| {
        let shape = tensor.size().iter().map(|&n| n as usize).collect();
        ((*name).to_owned(), shape, *dtype)
    });
    let start = header::write(described, metadata).map_err(|what| FileError::malformed(path, what))?;
    atomic::write(path, |file| {
        let mut out = BufWriter::new(file);
        out.write_all(&start)?;
        for (_, tensor, _) in &named {
            out.write_all(&bytes(tensor))?;
        }
        out.flush()
    })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

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
            (
                r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}"#,
                "tensor \"a\": F32 [4611686018427387904, 4] does not have the bytes 0..16",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,16]}}"#,
                "tensor \"a\": F32 [3] does not have the bytes 0..16",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[400000000000],"data_offsets":[0,1600000000000]}}"#,
                "cut off or too long: the header describes 1600000000000 bytes, the file holds 16",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#,
                "tensor \"a\" begins at 8, the one before it ends at 0: a hole before it",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[16,8]}}"#,
                "tensor \"a\": F32 [2] does not have the bytes 16..8",
            ),
            (
                r#"{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]},"b":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}}"#,
                "tensor \"b\" begins at 8, the one before it ends at 9: an overlap with it",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#,
                "\"a\" comes twice",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}"#,
                "invalid value: integer `-4`",
            ),
            (
                r#"{"a":{"dtype":"C64","shape":[2],"data_offsets":[0,16]}}"#,
                "tensor \"a\": kind C64 is not supported",
            ),
            (
                r#"{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,16]}}"#,
                "unknown variant `F33`",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16],"run":"me"}}"#,
                "unknown field `run`",
            ),
            ("[1]", "expected an object of tensors by name"),
            ("{", "safetensors header: EOF"),
        ];
        for (header, expected) in lies {
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend([0; 16]);
            std::fs::write(&bad, bytes).unwrap();
            let error = read(&bad).unwrap_err().to_string();
            assert!(error.contains(expected), "{header}: {error}");
        }
        let long = header::read(&(17u64 << 20).to_le_bytes(), 1 << 40).unwrap_err();
        assert!(
            long.contains("of 17825792 bytes is longer than 16777216"),
            "{long}"
        );
        std::fs::write(&bad, [0xff; 64]).unwrap();
        assert!(read(&bad).unwrap_err().to_string().contains("header claims"));
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(4000))]

        #[test]
        fn changed_headers_are_read_or_refused(
            edits in proptest::collection::vec((proptest::prelude::any::<proptest::sample::Index>(), proptest::prelude::any::<u8>()), 1..4),
            cut in 0usize..8,
        ) {
            let json = br#"{"__metadata__":{"a":"b"},"w":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"x":{"dtype":"I64","shape":[],"data_offsets":[8,16]}}"#;
            let mut bytes = [&(json.len() as u64).to_le_bytes()[..], json, &[0; 16]].concat();
            for (place, byte) in &edits {
                let place = place.index(bytes.len());
                bytes[place] = *byte;
            }
            bytes.truncate(bytes.len() - if cut < 4 { 0 } else { cut });
            if let Ok(header) = header::read(&bytes, bytes.len() as u64) {
                let end = header.tensors.last().map_or(0, |tensor| tensor.end);
                assert_eq!(header.data + end, bytes.len());
            }
        }
    }
}
