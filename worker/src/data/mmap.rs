//! A read-only memory map of one file. The only file of the data path with `unsafe`: mapping is unsafe because
//! another process may change the file below it.
//!
//! What that means for a user: a data set must not be rewritten in place while a job reads it. Changed bytes are
//! read as they are (and refused where they break the format); a file that *shrinks* makes the kernel send
//! SIGBUS to the process that touches a vanished page, which ends that rank as a crash would. Everything here
//! that writes data sets writes beside and renames, so that readers keep the old file.
#![allow(unsafe_code)]

use std::{
    fs::{self, File},
    io,
    ops::Deref,
    path::Path,
};

use memmap2::{Advice, Mmap};

/// How the pages will be touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// In no order: reading ahead would only waste memory.
    Random,
    /// From the beginning to the end.
    Sequential,
}

/// The bytes of a file.
#[derive(Debug)]
pub struct MappedFile {
    // An empty file cannot be mapped.
    map: Option<Mmap>,
}

impl MappedFile {
    /// Maps a file that exists.
    pub fn open(path: &Path, access: Access) -> io::Result<Self> {
        // Before it is opened: that of a pipe waits for somebody who writes.
        let metadata = fs::metadata(path)?;
        if metadata.is_dir() {
            return Err(io::Error::new(io::ErrorKind::IsADirectory, "is a directory"));
        }
        if !metadata.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "is not a regular file",
            ));
        }
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if metadata.len() == 0 {
            return Ok(Self { map: None });
        }
        // SAFETY: the mapping is private to this value, read-only, and handed out only as `&[u8]` that borrows from
        // it. Changes of the file by others are the caveat of the module head: they can end the process (SIGBUS) or
        // change bytes that are parsed without trust, but no reference outlives the mapping.
        let map = unsafe { Mmap::map(&file)? };
        // Advice is only a hint: where the kernel refuses it, reading still works.
        map.advise(match access {
            Access::Random => Advice::Random,
            Access::Sequential => Advice::Sequential,
        })
        .unwrap_or_default();
        Ok(Self { map: Some(map) })
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}
