//! MXNet RecordIO: the bytes of `train.rec`. Owns the framing and the image-record header; knows nothing of data sets,
//! labels' meaning or image formats.
//!
//! A record is one or more parts: u32 magic, u32 `cflag << 29 | length`, the bytes, zero padding to 4. A payload that
//! contains the magic at a 4-byte aligned place is split there (cflag 1 first, 2 middle, 3 last; 0 whole) and
//! the magic is left out, so that a scan for the magic finds part starts alone. A payload begins with the header
//! u32 flag, f32 label, u64 id, u64 id2 (little endian); `flag` f32 labels follow if it is not 0.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};

use super::{
    error::DataError,
    mmap::{Access, MappedFile},
    record_index::Index,
};

/// First word of every part.
pub const MAGIC: u32 = 0xced7_230a;
/// Length of the image-record header without its label array, in bytes.
pub const HEADER_BYTES: usize = 24;
/// Longest payload that is believed when it is read, and written, in bytes; a face crop has a few thousand.
pub const MAX_PAYLOAD: usize = 16 << 20;

/// A payload taken apart.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageRecord<'a> {
    /// Length of the label array; 0 is a single label.
    pub flag: u32,
    /// The label, or the label array; never empty.
    pub labels: Vec<f32>,
    /// Usually the key.
    pub id: u64,
    /// Usually 0.
    pub id2: u64,
    /// The encoded image; empty in header and identity records.
    pub body: Cow<'a, [u8]>,
}

/// One part as the file has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// 0 whole, 1 first, 2 middle, 3 last.
    pub cflag: u32,
    /// Bytes without padding.
    pub length: usize,
}

/// An open `.rec` with its `.idx`.
#[derive(Debug)]
pub struct RecordFile {
    path: PathBuf,
    map: MappedFile,
    index: Index,
}

impl RecordFile {
    /// Opens `path` (`.rec`) and the `.idx` beside it. Offsets are checked when they are used, or all at once by
    /// [`check_offsets`](Self::check_offsets).
    pub fn open(path: &Path, access: Access) -> Result<Self, DataError> {
        let map = MappedFile::open(path, access).map_err(|e| DataError::io(path, e))?;
        let index = Index::open(&path.with_extension("idx"))?;
        Ok(Self {
            path: path.into(),
            map,
            index,
        })
    }

    /// The `.rec` file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size in bytes.
    pub fn file_len(&self) -> u64 {
        self.map.len() as u64
    }

    /// Keys and offsets.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// How errors name a record.
    pub fn name(&self, key: u64) -> String {
        match self.index.offset(key) {
            Some(offset) => format!("{}: record {key} at offset {offset}", self.path.display()),
            None => format!("{}: record {key}", self.path.display()),
        }
    }

    /// Refuses an index that points outside of the file, and a file whose last record is cut off.
    pub fn check_offsets(&self) -> Result<(), DataError> {
        let mut last: Option<(u64, u64)> = None;
        for (key, offset) in self.index.iter() {
            if offset.checked_add(8).is_none_or(|end| end > self.file_len()) {
                return Err(self.error(
                    key,
                    format!(
                        "the index points past the end of the file ({} bytes)",
                        self.file_len()
                    ),
                ));
            }
            if last.is_none_or(|(_, before)| offset > before) {
                last = Some((key, offset));
            }
        }
        match last {
            Some((key, _)) => self.read(key).map(|_| ()),
            None => Err(DataError::format(
                &self.path.with_extension("idx"),
                "the index is empty",
            )),
        }
    }

    /// The payload of a record.
    pub fn payload(&self, key: u64) -> Result<Cow<'_, [u8]>, DataError> {
        let offset = self.offset(key)?;
        let (_, payload) = read_parts(&self.map, offset).map_err(|message| self.error(key, message))?;
        Ok(payload)
    }

    /// The parts of a record, as stored.
    pub fn parts(&self, key: u64) -> Result<Vec<Part>, DataError> {
        let offset = self.offset(key)?;
        let (parts, _) = read_parts(&self.map, offset).map_err(|message| self.error(key, message))?;
        Ok(parts)
    }

    /// A record taken apart.
    pub fn read(&self, key: u64) -> Result<ImageRecord<'_>, DataError> {
        let payload = self.payload(key)?;
        parse_image_record(payload).map_err(|message| self.error(key, message))
    }

    /// An error that names a record of this file.
    pub fn error(&self, key: u64, message: impl Into<String>) -> DataError {
        DataError::record(self.name(key), message)
    }

    fn offset(&self, key: u64) -> Result<u64, DataError> {
        self.index.offset(key).ok_or_else(|| {
            let index = self.path.with_extension("idx");
            DataError::format(&index, format!("key {key} is missing"))
        })
    }
}

/// The record that begins at `offset` of the bytes of a `.rec`; the error says what is wrong with it.
pub fn record_at(file: &[u8], offset: u64) -> Result<ImageRecord<'_>, String> {
    let (_, payload) = read_parts(file, offset)?;
    parse_image_record(payload)
}

/// Reads and joins the parts that begin at `offset`.
fn read_parts(file: &[u8], offset: u64) -> Result<(Vec<Part>, Cow<'_, [u8]>), String> {
    let mut at = usize::try_from(offset).map_err(|_| "the offset is beyond this machine's address space")?;
    if at % 4 != 0 {
        return Err("the offset is not a multiple of 4".into());
    }
    let mut parts = Vec::new();
    let mut joined: Vec<u8> = Vec::new();
    loop {
        let Some((magic, rest)) = file.get(at..).and_then(take_u32) else {
            return Err(format!(
                "the file ends at {} bytes, inside the record",
                file.len()
            ));
        };
        let Some((word, rest)) = take_u32(rest) else {
            return Err(format!(
                "the file ends at {} bytes, inside the record",
                file.len()
            ));
        };
        if magic != MAGIC {
            return Err(format!(
                "part {} begins with {magic:#010x}, not the magic {MAGIC:#010x}",
                parts.len()
            ));
        }
        let part = Part {
            cflag: word >> 29,
            length: (word & 0x1fff_ffff) as usize,
        };
        let Some(bytes) = rest.get(..part.length) else {
            return Err(format!(
                "part {} claims {} bytes, the file has {} left",
                parts.len(),
                part.length,
                rest.len()
            ));
        };
        if joined.len() + part.length > MAX_PAYLOAD {
            return Err(format!("the record is longer than {MAX_PAYLOAD} bytes"));
        }
        let first = parts.is_empty();
        parts.push(part);
        match (part.cflag, first) {
            (0, true) => return Ok((parts, Cow::Borrowed(bytes))),
            (1, true) => {}
            // The magic between two parts was left out by the writer.
            (2 | 3, false) => joined.extend_from_slice(&MAGIC.to_le_bytes()),
            (cflag, _) => {
                return Err(format!(
                    "part {} has cflag {cflag}, out of order",
                    parts.len() - 1
                ));
            }
        }
        joined.extend_from_slice(bytes);
        if part.cflag == 3 {
            return Ok((parts, Cow::Owned(joined)));
        }
        at += 8 + part.length.next_multiple_of(4);
    }
}

fn take_u32(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<4>()?;
    Some((u32::from_le_bytes(*head), rest))
}

fn take_u64(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<8>()?;
    Some((u64::from_le_bytes(*head), rest))
}

fn parse_image_record(payload: Cow<'_, [u8]>) -> Result<ImageRecord<'_>, String> {
    let header = |bytes| {
        let (flag, bytes) = take_u32(bytes)?;
        let (label, bytes) = take_u32(bytes)?;
        let (id, bytes) = take_u64(bytes)?;
        let (id2, bytes) = take_u64(bytes)?;
        Some((flag, f32::from_bits(label), id, id2, bytes))
    };
    let Some((flag, label, id, id2, rest)) = header(&payload) else {
        return Err(format!(
            "{} bytes are too few for the record header",
            payload.len()
        ));
    };
    let label_bytes = (flag as usize).saturating_mul(4);
    let Some(array) = rest.get(..label_bytes) else {
        return Err(format!(
            "the header claims {flag} labels, the record has {} bytes left",
            rest.len()
        ));
    };
    let labels = match flag {
        0 => vec![label],
        _ => array
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect(),
    };
    let body_at = HEADER_BYTES + label_bytes;
    let body = match payload {
        Cow::Borrowed(bytes) => Cow::Borrowed(bytes.get(body_at..).unwrap_or_default()),
        Cow::Owned(mut bytes) => Cow::Owned(bytes.split_off(body_at)),
    };
    Ok(ImageRecord {
        flag,
        labels,
        id,
        id2,
        body,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn part(cflag: u32, bytes: &[u8]) -> Vec<u8> {
        let mut out = MAGIC.to_le_bytes().to_vec();
        out.extend((cflag << 29 | bytes.len() as u32).to_le_bytes());
        out.extend(bytes);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }

    #[test]
    fn parts_are_joined_with_the_magic_between() {
        let file = [part(1, b"abcd"), part(2, b""), part(3, b"xyz")].concat();
        let (parts, payload) = read_parts(&file, 0).unwrap();
        assert_eq!(parts.len(), 3);
        let magic = MAGIC.to_le_bytes();
        assert_eq!(
            payload.as_ref(),
            [b"abcd", &magic[..], &magic[..], b"xyz"].concat()
        );
    }

    #[test]
    fn broken_framing_is_named() {
        let whole = part(0, b"payload!");
        for (file, offset, expected) in [
            (whole.clone(), 2, "the offset is not a multiple of 4"),
            (
                whole.clone(),
                4,
                "part 0 begins with 0x00000008, not the magic 0xced7230a",
            ),
            (
                whole[..12].to_vec(),
                0,
                "part 0 claims 8 bytes, the file has 4 left",
            ),
            (
                whole[..6].to_vec(),
                0,
                "the file ends at 6 bytes, inside the record",
            ),
            (whole, 400, "the file ends at 16 bytes, inside the record"),
            (part(2, b"x"), 0, "part 0 has cflag 2, out of order"),
            (part(1, b"x"), 0, "the file ends at 12 bytes, inside the record"),
            (
                [part(1, b"x"), part(0, b"y")].concat(),
                0,
                "part 1 has cflag 0, out of order",
            ),
        ] {
            assert_eq!(read_parts(&file, offset).unwrap_err(), expected);
        }
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let mut payload = vec![0u8; HEADER_BYTES];
        assert_eq!(parse_image_record(payload.clone().into()).unwrap().labels, [0.0]);
        payload[0..4].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = parse_image_record(payload.into()).unwrap_err();
        assert_eq!(
            error,
            "the header claims 4294967295 labels, the record has 0 bytes left"
        );
        let error = parse_image_record(vec![0u8; 23].into()).unwrap_err();
        assert_eq!(error, "23 bytes are too few for the record header");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), offset in 0u64..220) {
            if let Ok((_, payload)) = read_parts(&bytes, offset) {
                let _ = parse_image_record(payload);
            }
        }

        #[test]
        fn any_lengths_and_flags_are_read_or_refused(words in proptest::collection::vec((0u32..5, 0u32..40), 1..8)) {
            let file: Vec<u8> = words
                .iter()
                .flat_map(|(cflag, length)| [MAGIC, cflag << 29 | length, MAGIC, 1])
                .flat_map(u32::to_le_bytes)
                .collect();
            if let Ok((_, payload)) = read_parts(&file, 0) {
                let _ = parse_image_record(payload);
            }
        }
    }
}
