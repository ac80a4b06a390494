//! Compiled kernels on disk: one file each, with a digest of its content before it. Knows no compiler; a name is whatever
//! the caller makes of everything that a result depends on.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

/// First bytes of a file: format and version.
const MAGIC: &[u8; 16] = b"arcface kernel 1";

/// A folder of results. Several processes may share it: files appear whole.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// The results in this folder, which need not exist.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Where this user's results are: `arcface/kernels` in the user's cache folder. `None` if there is no such folder.
    pub fn of_user() -> Option<Self> {
        let absolute = |name: &str| {
            let path = PathBuf::from(std::env::var_os(name)?);
            path.is_absolute().then_some(path)
        };
        let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
        Some(Self::new(cache.join("arcface/kernels")))
    }

    /// Where they are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What was stored under a name; `None` if nothing was, or not all of it is there as it was.
    pub fn load(&self, name: &str) -> Option<Vec<u8>> {
        let file = fs::read(self.folder.join(name)).ok()?;
        let (magic, rest) = file.split_first_chunk::<{ MAGIC.len() }>()?;
        let (digest, bytes) = rest.split_first_chunk::<{ blake3::OUT_LEN }>()?;
        let whole = magic == MAGIC && blake3::hash(bytes) == *digest;
        whole.then(|| bytes.to_vec())
    }

    /// Stores a result, in place of an earlier one. It is not synced: after a crash the digest tells.
    ///
    /// # Errors
    /// What the file system says.
    pub fn store(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
        file.write_all(MAGIC)?;
        file.write_all(blake3::hash(bytes).as_bytes())?;
        file.write_all(bytes)?;
        file.persist(self.folder.join(name))?;
        Ok(())
    }
}
