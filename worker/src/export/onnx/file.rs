//! Writes a model to disk, one weight at a time: a network of gigabytes needs no second copy of itself in memory.
//!
//! A protobuf message is the concatenation of its fields, so the file is the encoded head of each message followed by
//! its weights. Protobuf ends at 2 GiB; beyond it the weights go into a second file beside the first, as the
//! specification's "external data" has it.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use prost::{Message, encode_length_delimiter, length_delimiter_len};

use super::{
    constants::Initializer,
    emit::Emitted,
    proto::{DataLocation, ModelProto, StringStringEntryProto, TensorProto},
};
use crate::export::{FileError, atomic, bytes};

/// Largest message that readers of protobuf take, in bytes.
pub const PROTOBUF_LIMIT: u64 = (1 << 31) - 1;
/// Weights in the second file start at multiples of this many bytes, so that readers can map them.
const ALIGNMENT: u64 = 4096;
/// Smaller constants stay in the first file: readers want shapes at hand.
const SMALL: u64 = 1024;

/// Keys of fields that are written by hand: number * 8 + 2 (a length follows).
const MODEL_GRAPH: u8 = 7 << 3 | 2;
const GRAPH_INITIALIZER: u8 = 5 << 3 | 2;
const TENSOR_RAW_DATA: u8 = 9 << 3 | 2;

/// What was written.
#[derive(Debug, PartialEq, Eq)]
pub struct Written {
    /// Length of the file, in bytes.
    pub bytes: u64,
    /// The second file and its length, if the weights are in one.
    pub data: Option<(PathBuf, u64)>,
}

/// Writes the model with its graph, atomically. A message of more than `limit` bytes gets a second file, FILE.data.
pub fn write(path: &Path, model: &ModelProto, emitted: &Emitted, limit: u64) -> Result<Written, FileError> {
    let inline: Vec<TensorProto> = emitted.initializers.iter().map(head).collect();
    let layout = Layout {
        model,
        emitted,
        heads: &inline,
    };
    if layout.message_len() <= limit {
        atomic::write(path, |file| layout.stream(file))?;
        return Ok(Written {
            bytes: layout.message_len(),
            data: None,
        });
    }
    let data = beside(path)?;
    let location = data
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let mut end = 0;
    let heads: Vec<TensorProto> = emitted
        .initializers
        .iter()
        .map(|constant| match constant.num_bytes() {
            0..SMALL => head(constant),
            length => {
                let offset = u64::next_multiple_of(end, ALIGNMENT);
                end = offset + length;
                outside(head(constant), location, offset, length)
            }
        })
        .collect();
    let layout = Layout {
        model,
        emitted,
        heads: &heads,
    };
    if layout.message_len() > limit {
        return Err(FileError::malformed(
            path,
            "the graph without its weights is over 2 GiB, the end of protobuf",
        ));
    }
    // The weights first: a model must not name a file that is not there.
    atomic::write(&data, |file| layout.stream_data(file))?;
    atomic::write(path, |file| layout.stream(file))?;
    Ok(Written {
        bytes: layout.message_len(),
        data: Some((data, end)),
    })
}

/// FILE.data
fn beside(path: &Path) -> Result<PathBuf, FileError> {
    match path.file_name().and_then(|name| name.to_str()) {
        Some(name) => Ok(path.with_file_name(format!("{name}.data"))),
        None => Err(FileError::malformed(
            path,
            "a network of over 2 GiB is two files, and the first must name the second in UTF-8",
        )),
    }
}

/// A constant without its values.
fn head(constant: &Initializer) -> TensorProto {
    TensorProto {
        dims: constant.dims.clone(),
        data_type: Some(constant.data_type.into()),
        name: constant.name.clone(),
        ..Default::default()
    }
}

fn outside(head: TensorProto, location: &str, offset: u64, length: u64) -> TensorProto {
    let entry = |key: &str, value: String| StringStringEntryProto {
        key: key.to_owned(),
        value,
    };
    TensorProto {
        external_data: vec![
            entry("location", location.to_owned()),
            entry("offset", offset.to_string()),
            entry("length", length.to_string()),
        ],
        data_location: Some(DataLocation::External.into()),
        ..head
    }
}

fn is_outside(head: &TensorProto) -> bool {
    head.data_location() == DataLocation::External
}

/// Length of a field with a one-byte key and `length` bytes.
fn field_len(length: u64) -> u64 {
    1 + length_delimiter_len(length as usize) as u64 + length
}

fn write_field_start(out: &mut impl Write, key: u8, length: u64) -> io::Result<()> {
    let mut start = vec![key];
    encode_length_delimiter(length as usize, &mut start).map_err(io::Error::other)?;
    out.write_all(&start)
}

/// A model with the heads of its constants, in order.
struct Layout<'a> {
    model: &'a ModelProto,
    emitted: &'a Emitted,
    heads: &'a [TensorProto],
}

impl Layout<'_> {
    fn constants(&self) -> impl Iterator<Item = (&TensorProto, &Initializer)> {
        self.heads.iter().zip(&self.emitted.initializers)
    }

    fn tensor_len(head: &TensorProto, constant: &Initializer) -> u64 {
        let values = if is_outside(head) {
            0
        } else {
            field_len(constant.num_bytes())
        };
        head.encoded_len() as u64 + values
    }

    fn graph_len(&self) -> u64 {
        let constants = self
            .constants()
            .map(|(head, constant)| field_len(Self::tensor_len(head, constant)));
        self.emitted.graph.encoded_len() as u64 + constants.sum::<u64>()
    }

    fn message_len(&self) -> u64 {
        self.model.encoded_len() as u64 + field_len(self.graph_len())
    }

    fn stream(&self, file: &mut File) -> io::Result<()> {
        let mut out = BufWriter::new(file);
        out.write_all(&self.model.encode_to_vec())?;
        write_field_start(&mut out, MODEL_GRAPH, self.graph_len())?;
        out.write_all(&self.emitted.graph.encode_to_vec())?;
        for (head, constant) in self.constants() {
            write_field_start(&mut out, GRAPH_INITIALIZER, Self::tensor_len(head, constant))?;
            out.write_all(&head.encode_to_vec())?;
            if !is_outside(head) {
                write_field_start(&mut out, TENSOR_RAW_DATA, constant.num_bytes())?;
                out.write_all(&values(constant)?)?;
            }
        }
        out.flush()
    }

    fn stream_data(&self, file: &mut File) -> io::Result<()> {
        let mut out = BufWriter::new(file);
        let mut end = 0;
        for (_, constant) in self.constants().filter(|(head, _)| is_outside(head)) {
            let gap = u64::next_multiple_of(end, ALIGNMENT) - end;
            out.write_all(&vec![0; gap as usize])?;
            out.write_all(&values(constant)?)?;
            end += gap + constant.num_bytes();
        }
        out.flush()
    }
}

/// The values of a constant as bytes: as many as its head promises.
fn values(constant: &Initializer) -> io::Result<Vec<u8>> {
    let bytes = bytes(&constant.value());
    if bytes.len() as u64 != constant.num_bytes() {
        return Err(io::Error::other(format!(
            "{}: {} bytes of values, {} announced",
            constant.name,
            bytes.len(),
            constant.num_bytes()
        )));
    }
    Ok(bytes)
}
