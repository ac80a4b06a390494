//! A crash before and after every operation of the writer, and every operation failing once: what is left is the old or
//! the new, whole.

use super::*;
use crate::checkpoint::disk::{Disk, Real};
use std::{
    cell::{Cell, RefCell},
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::PathBuf,
};

/// What happens at the chosen operation.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// It fails with this error of the system; those after it work.
    Fails(i32),
    /// The machine stops before it.
    CrashBefore,
    /// The machine stops after it.
    CrashAfter,
}

/// "No space left on device", "Input/output error".
const ERRORS: [i32; 2] = [28, 5];

/// Takes back what was not made durable, where a crash loses it.
enum Undo {
    Made(PathBuf),
    Removed(PathBuf, Vec<u8>),
    Renamed {
        from: PathBuf,
        to: PathBuf,
        replaced: Option<Vec<u8>>,
    },
}

impl Undo {
    fn directory(&self) -> &Path {
        let (Self::Made(path) | Self::Removed(path, _) | Self::Renamed { to: path, .. }) = self;
        path.parent().expect("a parent")
    }

    fn run(self) {
        match self {
            Self::Made(path) if path.is_dir() => drop(fs::remove_dir_all(path)),
            Self::Made(path) => drop(fs::remove_file(path)),
            Self::Removed(path, contents) => {
                fs::create_dir_all(path.parent().expect("a parent")).expect("make");
                fs::write(path, contents).expect("write");
            }
            Self::Renamed { from, to, replaced } => {
                fs::rename(&to, from).expect("rename");
                if let Some(old) = replaced {
                    fs::write(to, old).expect("write");
                }
            }
        }
    }
}

/// The file system, with one fault.
struct Faulty {
    at: usize,
    fault: Fault,
    /// A crash loses what was not synced.
    forgetful: bool,
    operations: Cell<usize>,
    crashed: Cell<bool>,
    names: RefCell<Vec<Undo>>,
    /// Inodes whose bytes are in memory alone.
    dirty: RefCell<Vec<u64>>,
}

impl Faulty {
    fn new(at: usize, fault: Fault, forgetful: bool) -> Self {
        Self {
            at,
            fault,
            forgetful,
            operations: Cell::new(0),
            crashed: Cell::new(false),
            names: RefCell::default(),
            dirty: RefCell::default(),
        }
    }

    fn operation<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let dead = || Err(io::Error::other("the machine has stopped"));
        if self.crashed.get() {
            return dead();
        }
        let number = self.operations.get();
        self.operations.set(number + 1);
        match self.fault {
            _ if number != self.at => work(),
            Fault::Fails(code) => Err(io::Error::from_raw_os_error(code)),
            Fault::CrashBefore => {
                self.crashed.set(true);
                dead()
            }
            Fault::CrashAfter => {
                let done = work();
                self.crashed.set(true);
                done.and_then(|_| dead())
            }
        }
    }

    fn will_undo(&self, undo: Undo) {
        self.names.borrow_mut().push(undo);
    }

    /// The machine starts again: files under `root` are as the disk has them.
    fn restart(self, root: &Path) {
        if !self.forgetful {
            return;
        }
        // Half of the bytes reached the disk.
        let dirty = self.dirty.into_inner();
        let mut folders = vec![root.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).expect("list") {
                let path = entry.expect("entry").path();
                let seen = fs::metadata(&path).expect("metadata");
                if seen.is_dir() {
                    folders.push(path);
                } else if dirty.contains(&seen.ino()) {
                    let file = File::options().write(true).open(path).expect("open");
                    file.set_len(seen.len() / 2).expect("cut");
                }
            }
        }
        self.names.into_inner().into_iter().rev().for_each(Undo::run);
    }
}

impl Disk for Faulty {
    fn make_dir(&self, dir: &Path) -> io::Result<()> {
        self.operation(|| {
            self.will_undo(Undo::Made(dir.to_owned()));
            Real.make_dir(dir)
        })
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        self.operation(|| {
            let file = Real.create(path)?;
            self.will_undo(Undo::Made(path.to_owned()));
            self.dirty.borrow_mut().push(file.metadata()?.ino());
            Ok(file)
        })
    }

    fn write(&self, file: &mut File, bytes: &[u8]) -> io::Result<()> {
        self.operation(|| Real.write(file, bytes))
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.operation(|| {
            let inode = file.metadata()?.ino();
            self.dirty.borrow_mut().retain(|dirty| *dirty != inode);
            Ok(())
        })
    }

    fn reopen(&self, path: &Path) -> io::Result<File> {
        self.operation(|| Real.reopen(path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.operation(|| {
            let replaced = fs::read(to).ok();
            Real.rename(from, to)?;
            self.will_undo(Undo::Renamed {
                from: from.to_owned(),
                to: to.to_owned(),
                replaced,
            });
            Ok(())
        })
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.operation(|| {
            self.names.borrow_mut().retain(|undo| undo.directory() != dir);
            Ok(())
        })
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.operation(|| {
            let contents = fs::read(path)?;
            Real.remove_file(path)?;
            self.will_undo(Undo::Removed(path.to_owned(), contents));
            Ok(())
        })
    }

    fn remove_dir_all(&self, dir: &Path) -> io::Result<()> {
        // Its files go one by one: a crash may leave any of them.
        self.operation(|| Real.remove_dir_all(dir))
    }
}

/// A disk without a fault, which waits for no real one.
fn quick() -> Faulty {
    Faulty::new(usize::MAX, Fault::CrashBefore, false)
}

/// Writes a whole checkpoint on `disk`; the parts that were durable before the first error.
fn write_on(disk: &dyn Disk, dir: &Path) -> (Vec<CheckpointPart>, Result<(), CheckpointError>) {
    let mut durable = Vec::new();
    let kinds = [(0, 4), (4, 8)].map(|(lo, hi)| PartKind::Head(ClassRange { lo, hi }));
    let result = (|| {
        durable.push(write::write_part_on(
            disk,
            dir,
            PartKind::Backbone,
            &backbone(),
            &|| {},
        )?);
        for kind in kinds {
            durable.push(write::write_part_on(
                disk,
                dir,
                kind,
                &head(kind.classes()),
                &|| {},
            )?);
        }
        let manifest = CheckpointManifest {
            format: manifest::FORMAT,
            num_classes: 8,
            parts: durable.clone(),
            ..Default::default()
        };
        write::write_manifest_on(disk, dir, &manifest)
    })();
    (durable, result)
}

/// Runs `work` with a fault at every operation in turn until it needs no more operations; then looks with `check`.
fn at_every_operation(work: impl Fn(&Faulty, &Path), check: impl Fn(&Path, Fault)) -> usize {
    let mut cells = 0;
    let crashes = [Fault::CrashBefore, Fault::CrashAfter];
    let errors = ERRORS.map(Fault::Fails);
    for fault in crashes.into_iter().chain(errors) {
        for forgetful in [false, true] {
            for at in 0.. {
                let dir = tempfile::tempdir().expect("scratch");
                let disk = Faulty::new(at, fault, forgetful);
                work(&disk, dir.path());
                if disk.operations.get() <= at {
                    break;
                }
                cells += 1;
                if disk.crashed.get() {
                    disk.restart(dir.path());
                }
                check(dir.path(), fault);
            }
        }
    }
    cells
}

fn temporary_files(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).into_iter().flatten();
    names
        .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
        .filter(|name| name.ends_with(".tmp"))
        .collect()
}

#[test]
fn a_new_checkpoint_is_whole_or_none_and_the_one_before_it_untouched() {
    let durable = RefCell::new(Vec::new());
    let cells = at_every_operation(
        |disk, root| {
            write_on(&quick(), &root.join("old")).1.expect("the old one");
            let (parts, result) = write_on(disk, &root.join("new"));
            assert_eq!(result.is_ok(), disk.operations.get() <= disk.at, "at {}", disk.at);
            *durable.borrow_mut() = parts;
        },
        |root, fault| {
            let old = Checkpoint::open_dir(&root.join("old")).expect("the old one");
            old.verify().expect("the old one is whole");
            let new = root.join("new");
            if let Ok(checkpoint) = Checkpoint::open_dir(&new) {
                checkpoint.verify().expect("a manifest says that all is there");
            }
            for part in durable.borrow().iter() {
                let bytes = fs::read(new.join(&part.file)).expect("a part that was told to be durable");
                assert_eq!(blake3::hash(&bytes).to_hex().as_str(), part.blake3);
            }
            if matches!(fault, Fault::Fails(_)) {
                assert_eq!(temporary_files(&new), [""; 0], "{fault:?}");
                // With room again, the next try works.
                write_on(&quick(), &new).1.expect("written");
            }
        },
    );
    assert!(cells > 200, "{cells}");
}

#[test]
fn a_part_that_is_written_again_is_the_old_or_the_new_one() {
    let versions = [1.0f32, 2.0].map(|value| vec![("w".to_owned(), Tensor::from_slice(&[value; 3000]))]);
    let contents = versions.each_ref().map(|tensors| {
        let dir = tempfile::tempdir().expect("scratch");
        write_part(dir.path(), PartKind::Backbone, tensors).expect("written");
        fs::read(dir.path().join("backbone.safetensors")).expect("read")
    });
    let cells = at_every_operation(
        |disk, root| {
            write::write_part_on(&quick(), root, PartKind::Backbone, &versions[0], &|| {})
                .expect("the old one");
            drop(write::write_part_on(
                disk,
                root,
                PartKind::Backbone,
                &versions[1],
                &|| {},
            ));
        },
        |root, fault| {
            let found = fs::read(root.join("backbone.safetensors")).expect("one of them");
            assert!(contents.contains(&found), "{fault:?}: {} bytes", found.len());
        },
    );
    assert!(cells > 40, "{cells}");
}

#[test]
fn a_removed_checkpoint_is_whole_or_none() {
    let cells = at_every_operation(
        |disk, root| {
            write_on(&quick(), &root.join("checkpoints/1")).1.expect("whole");
            drop(write::remove_on(disk, root, "checkpoints/1"));
        },
        |root, fault| {
            if let Ok(manifest) = manifest::read_manifest(&root.join("checkpoints/1")) {
                let checkpoint = Checkpoint::open(&root.join("checkpoints/1"), manifest);
                let whole = checkpoint.and_then(|checkpoint| checkpoint.verify());
                assert!(whole.is_ok(), "{fault:?}: {whole:?}");
            }
            write::remove(root, "checkpoints/1").expect("removed in the end");
        },
    );
    assert!(cells >= 3 * 8, "{cells}");
}

/// A disk that loses bytes without a word.
struct Liar;

impl Disk for Liar {
    fn make_dir(&self, dir: &Path) -> io::Result<()> {
        Real.make_dir(dir)
    }
    fn create(&self, path: &Path) -> io::Result<File> {
        Real.create(path)
    }
    fn write(&self, file: &mut File, bytes: &[u8]) -> io::Result<()> {
        Real.write(file, &vec![0; bytes.len()])
    }
    fn sync(&self, file: &File) -> io::Result<()> {
        Real.sync(file)
    }
    fn reopen(&self, path: &Path) -> io::Result<File> {
        Real.reopen(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        Real.rename(from, to)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        Real.sync_dir(dir)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        Real.remove_file(path)
    }
    fn remove_dir_all(&self, dir: &Path) -> io::Result<()> {
        Real.remove_dir_all(dir)
    }
}

#[test]
fn a_part_that_does_not_come_back_is_never_told_to_be_durable() {
    let dir = tempfile::tempdir().expect("scratch");
    let error = write::write_part_on(&Liar, dir.path(), PartKind::Backbone, &backbone(), &|| {})
        .expect_err("lost")
        .to_string();
    assert!(
        error.contains("backbone.safetensors: contents changed"),
        "{error}"
    );
    assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 0);
}
