//! Files that appear whole or not at all: written under a temporary name in the same folder, synced, renamed.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use super::FileError;

/// Writes `path` through `write`, which gets the temporary file. Whatever fails, `path` keeps its old content.
pub fn write(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), FileError> {
    // Renaming replaces whatever is there, even a device such as /dev/stdout.
    if fs::metadata(path).is_ok_and(|there| !there.is_file()) {
        return Err(FileError::malformed(path, "is not a regular file"));
    }
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let temporary = temporary_name(folder, path);
    let result = File::create(&temporary)
        .and_then(|mut file| {
            write(&mut file)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&temporary, path))
        // The rename itself lasts only once the folder is on disk.
        .and_then(|()| File::open(folder)?.sync_all());
    if result.is_err() {
        // Best effort: the error that matters is the one above.
        fs::remove_file(&temporary).ok();
    }
    // What is missing is the folder: the file need not be there.
    let place = if folder.is_dir() { path } else { folder };
    result.map_err(FileError::io(place))
}

fn temporary_name(folder: &Path, path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    folder.join(format!(".{name}.{}.tmp", std::process::id()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_no_file_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let error = write(folder.path(), |file| file.write_all(b"new")).unwrap_err();
        assert!(error.to_string().ends_with(": is not a regular file"), "{error}");
        assert!(folder.path().is_dir());
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write(&path, |file| file.write_all(b"old")).unwrap();
        let error = write(&path, |file| {
            file.write_all(b"half")?;
            Err(io::Error::other("disk full"))
        });
        assert!(error.unwrap_err().to_string().contains("disk full"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
