//! What the writer asks of the file system, one call an operation: a test puts another disk in its place and lets each
//! operation fail, or be the last before a crash.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::Path,
};

/// The operations. Paths are as given, errors those of the system.
pub trait Disk {
    /// Makes one directory; one that is there is no error.
    fn make_dir(&self, dir: &Path) -> io::Result<()>;
    /// Makes a file that must not be there.
    fn create(&self, path: &Path) -> io::Result<File>;
    /// Appends to it.
    fn write(&self, file: &mut File, bytes: &[u8]) -> io::Result<()>;
    /// Makes its bytes durable.
    fn sync(&self, file: &File) -> io::Result<()>;
    /// Opens a durable file, such that what is read comes from the disk and not from memory, where the system can do that.
    fn reopen(&self, path: &Path) -> io::Result<File>;
    /// Gives a file another name, in place of what has that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Makes the names in a directory durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes a directory with everything in it.
    fn remove_dir_all(&self, dir: &Path) -> io::Result<()>;
}

/// The file system.
pub struct Real;

impl Disk for Real {
    fn make_dir(&self, dir: &Path) -> io::Result<()> {
        match fs::create_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
            made => made,
        }
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        OpenOptions::new().write(true).create_new(true).open(path)
    }

    fn write(&self, file: &mut File, bytes: &[u8]) -> io::Result<()> {
        file.write_all(bytes)?;
        // The disk begins now, and not when the file is synced.
        forget(file);
        Ok(())
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn reopen(&self, path: &Path) -> io::Result<File> {
        let file = File::open(path)?;
        forget(&file);
        Ok(file)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir_all(&self, dir: &Path) -> io::Result<()> {
        fs::remove_dir_all(dir)
    }
}

/// Tells the system that the file's bytes need not stay in memory: it begins to write those that are not on the disk, and forgets the
/// others. Only advice: a file system without a cache of its own has nothing to forget.
pub fn forget(file: &File) {
    #[cfg(target_os = "linux")]
    let _kept = nix::fcntl::posix_fadvise(file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    #[cfg(not(target_os = "linux"))]
    let _ = file;
}
