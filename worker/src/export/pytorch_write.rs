//! Writes a `state_dict` that `torch.load(weights_only=True)` reads: the other half of [`super::pytorch`].

use std::{
    io::{self, BufWriter, Write},
    path::Path,
};

use tch::Tensor;
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

use super::{FileError, atomic, bytes, dtype_of, pytorch::STORAGES};

/// Values start at multiples of this many bytes, as PyTorch aligns them for memory maps.
const ALIGNMENT: u16 = 64;

/// Writes the tensors as an ordered `state_dict`, one storage each, atomically.
pub fn write<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
) -> Result<(), FileError> {
    let tensors: Vec<(&str, &Tensor)> = tensors.into_iter().collect();
    let pickle = pickle(&tensors).map_err(|what| FileError::malformed(path, what))?;
    atomic::write(path, |file| {
        archive(file, &pickle, &tensors).map_err(io::Error::other)
    })
}

fn archive(
    file: &mut std::fs::File,
    pickle: &[u8],
    tensors: &[(&str, &Tensor)],
) -> zip::result::ZipResult<()> {
    let mut zip = ZipWriter::new(BufWriter::new(file));
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .with_alignment(ALIGNMENT);
    let mut entry = |name: &str, bytes: &[u8]| {
        // Readers of the old 32-bit form need no telling unless an entry is that large.
        let options = options.large_file(bytes.len() as u64 > u64::from(u32::MAX));
        zip.start_file(format!("archive/{name}"), options)?;
        zip.write_all(bytes)?;
        Ok::<(), zip::result::ZipError>(())
    };
    entry("data.pkl", pickle)?;
    entry("byteorder", b"little")?;
    for (key, (_, tensor)) in tensors.iter().enumerate() {
        entry(&format!("data/{key}"), &bytes(tensor))?;
    }
    entry("version", b"3\n")?;
    zip.finish()?.flush()?;
    Ok(())
}

/// `OrderedDict` of `_rebuild_tensor_v2(storage, 0, size, stride, False, OrderedDict())`, pickle protocol 2.
fn pickle(tensors: &[(&str, &Tensor)]) -> Result<Vec<u8>, String> {
    let mut out = Pickler(b"\x80\x02".to_vec());
    out.global("collections", "OrderedDict");
    out.0.extend(b")R("); // called without arguments, then a mark for its items
    for (key, (name, tensor)) in tensors.iter().enumerate() {
        let (class, _) = STORAGES
            .iter()
            .find(|(_, dtype)| Some(*dtype) == dtype_of(tensor.kind()))
            .ok_or_else(|| format!("tensor {name:?}: kind {:?} cannot be written", tensor.kind()))?;
        out.text(name);
        out.global("torch._utils", "_rebuild_tensor_v2");
        out.0.extend(b"((");
        out.text("storage");
        out.global("torch", class);
        out.text(&key.to_string());
        out.text("cpu");
        out.int(tensor.numel() as i64);
        out.0.extend(b"tQ"); // the tuple is a persistent id
        out.int(0);
        let size = tensor.size();
        out.tuple(&size);
        out.tuple(&contiguous_strides(&size));
        out.0.push(0x89); // False
        out.global("collections", "OrderedDict");
        out.0.extend(b")RtR");
    }
    out.0.extend(b"u.");
    Ok(out.0)
}

fn contiguous_strides(size: &[i64]) -> Vec<i64> {
    let mut strides = vec![1; size.len()];
    for dim in (1..size.len()).rev() {
        strides[dim - 1] = strides[dim] * size[dim].max(1);
    }
    strides
}

/// The few operations that a state_dict needs.
struct Pickler(Vec<u8>);

impl Pickler {
    fn global(&mut self, module: &str, name: &str) {
        self.0.extend(format!("c{module}\n{name}\n").into_bytes());
    }

    fn text(&mut self, text: &str) {
        self.0.push(b'X');
        self.0.extend((text.len() as u32).to_le_bytes());
        self.0.extend(text.as_bytes());
    }

    fn int(&mut self, value: i64) {
        match i32::try_from(value) {
            Ok(small) => {
                self.0.push(b'J');
                self.0.extend(small.to_le_bytes());
            }
            Err(_) => {
                self.0.extend([0x8a, 8]); // LONG1 of 8 bytes
                self.0.extend(value.to_le_bytes());
            }
        }
    }

    fn tuple(&mut self, values: &[i64]) {
        self.0.push(b'(');
        for &value in values {
            self.int(value);
        }
        self.0.push(b't');
    }
}
