//! NumPy's `.npy` format, version 1: enough to write one f32 matrix.

use std::{io::Write, path::Path};

use tch::{Kind, Tensor};

use super::{FileError, atomic, bytes};

/// Writes a tensor as little-endian f32, row major, atomically.
pub fn write(path: &Path, tensor: &Tensor) -> Result<(), FileError> {
    let shape: String = tensor.size().iter().map(|n| format!("{n},")).collect();
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape}), }}");
    // Magic, version and length take 10 bytes; the values start at a multiple of 64, after a newline.
    let padded = (10 + header.len() + 1).next_multiple_of(64) - 10;
    header.extend(std::iter::repeat_n(' ', padded - 1 - header.len()));
    header.push('\n');
    let length = u16::try_from(header.len())
        .map_err(|_| FileError::malformed(path, "the tensor has too many dimensions"))?;
    atomic::write(path, |file| {
        file.write_all(b"\x93NUMPY\x01\x00")?;
        file.write_all(&length.to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        file.write_all(&bytes(&tensor.to_kind(Kind::Float)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_is_laid_out_as_numpy_writes_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npy");
        write(
            &path,
            &Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]).view([2, 3]),
        )
        .unwrap();
        let written = std::fs::read(&path).unwrap();
        assert_eq!(written.len(), 128 + 24);
        assert_eq!(&written[..10], b"\x93NUMPY\x01\x00\x76\x00");
        assert!(written[10..].starts_with(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,3,), }"));
        assert_eq!(written[127], b'\n');
        assert_eq!(written[148..152], 6f32.to_le_bytes());
    }
}
