//! The highest epoch of a coordinator that this node's agent has obeyed. In a state directory it outlives the agent: a
//! coordinator that was replaced cannot command the agent that is started next, either.

use arcface_proto::failure::{ExitCode, Failure};
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Name of the file, and of the lock beside it.
const FILE: &str = "epoch";
const LOCK: &str = "lock";
/// First line of the file.
const FORMAT: &str = "arcface-agent-state 1";

/// The highest epoch so far.
#[derive(Debug)]
pub struct Epoch {
    newest: u64,
    kept: Option<Kept>,
}

/// Where it is kept. One agent at a time has the directory.
#[derive(Debug)]
struct Kept {
    directory: PathBuf,
    _lock: File,
}

impl Epoch {
    /// None was seen so far, and none will be remembered after this process.
    pub fn in_memory() -> Self {
        Self {
            newest: 0,
            kept: None,
        }
    }

    /// The one that a state directory holds, 0 if it is new. It is made if it does not exist.
    ///
    /// # Errors
    /// A directory that another agent uses, that cannot be written, or whose file is damaged.
    pub fn open(directory: &Path) -> Result<Self, Failure> {
        let lock = lock(directory)?;
        let path = directory.join(FILE);
        let newest = match fs::read_to_string(&path) {
            Ok(text) => decode(&text).ok_or_else(|| damaged(&path, "it is not what an agent writes"))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(damaged(&path, &error.to_string())),
        };
        Ok(Self {
            newest,
            kept: Some(Kept {
                directory: directory.to_owned(),
                _lock: lock,
            }),
        })
    }

    /// The highest so far.
    pub fn newest(&self) -> u64 {
        self.newest
    }

    /// Raises it; a lower one changes nothing. It is durable when this returns: only then may a command of that epoch be
    /// acted on. It blocks for one write to the disk, once in a coordinator's life.
    ///
    /// # Errors
    /// What the disk says; it stays what it was.
    pub fn raise(&mut self, epoch: u64) -> io::Result<()> {
        if epoch > self.newest {
            if let Some(kept) = &self.kept {
                write(&kept.directory, epoch)?;
            }
            self.newest = epoch;
        }
        Ok(())
    }

    /// What to do about a coordinator of a lower epoch that is no old one, in brackets; empty if nothing is kept.
    pub fn advice(&self) -> String {
        self.kept.as_ref().map_or_else(String::new, |kept| {
            format!(
                " (kept in {}; a worker of another cluster, or of a store that was made anew, needs another --state-dir)",
                kept.directory.display()
            )
        })
    }
}

fn lock(directory: &Path) -> Result<File, Failure> {
    let failed = |error: &dyn std::fmt::Display| {
        let message = format!("--state-dir {}: {error}", directory.display());
        Failure::new(ExitCode::Failed, message).hint("name a directory that this worker may write to")
    };
    fs::create_dir_all(directory).map_err(|error| failed(&error))?;
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(directory.join(LOCK))
        .map_err(|error| failed(&error))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => {
            let message = format!("--state-dir {}: another worker uses it", directory.display());
            Err(Failure::new(ExitCode::Failed, message)
                .hint("give every worker a directory of its own, or stop the other one"))
        }
        Err(TryLockError::Error(error)) => Err(failed(&error)),
    }
}

fn damaged(path: &Path, problem: &str) -> Failure {
    Failure::new(
        ExitCode::Failed,
        format!("--state-dir: {} cannot be read: {problem}", path.display()),
    )
    .hint(
        "it keeps old coordinators from commanding this node; if no replaced coordinator can run any more, delete the \
         file and start the worker again",
    )
}

/// Under a temporary name, synced, renamed, and the name synced.
fn write(directory: &Path, epoch: u64) -> io::Result<()> {
    let temporary = directory.join(format!("{FILE}.tmp"));
    let mut file = File::create(&temporary)?;
    file.write_all(encode(epoch).as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, directory.join(FILE))?;
    File::open(directory)?.sync_all()
}

fn encode(epoch: u64) -> String {
    let body = format!("{FORMAT}\nepoch {epoch}\n");
    let crc32 = crc32fast::hash(body.as_bytes());
    format!("{body}crc32 {crc32:08x}\n")
}

/// The epoch of a file's text; `None` if that is not exactly what [`encode`] makes.
fn decode(text: &str) -> Option<u64> {
    let epoch = text.lines().nth(1)?.strip_prefix("epoch ")?.parse().ok()?;
    (encode(epoch) == text).then_some(epoch)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch() -> tempfile::TempDir {
        tempfile::tempdir().expect("scratch directory")
    }

    #[test]
    fn it_is_there_after_a_restart_and_never_falls() {
        let scratch = scratch();
        let directory = scratch.path().join("made/on/the/way");
        for (raised, kept) in [(7, 7), (3, 7), (8, 8)] {
            let mut epoch = Epoch::open(&directory).expect("open");
            epoch.raise(raised).expect("written");
            assert_eq!(epoch.newest(), kept);
            drop(epoch);
            assert_eq!(Epoch::open(&directory).expect("open again").newest(), kept);
        }
    }

    #[test]
    fn one_agent_at_a_time_has_the_directory() {
        let scratch = scratch();
        let first = Epoch::open(scratch.path()).expect("open");
        let refused = Epoch::open(scratch.path()).expect_err("it is in use");
        assert!(refused.message.contains("another worker uses it"), "{refused}");
        drop(first);
        Epoch::open(scratch.path()).expect("free again");
    }

    #[test]
    fn any_damage_is_an_error() {
        let scratch = scratch();
        let path = scratch.path().join(FILE);
        Epoch::open(scratch.path())
            .expect("open")
            .raise(42)
            .expect("written");
        let whole = fs::read(&path).expect("the file");
        let mut damages: Vec<Vec<u8>> = (0..whole.len()).map(|length| whole[..length].to_vec()).collect();
        damages.extend((0..whole.len()).map(|at| {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            flipped
        }));
        damages.push([whole.as_slice(), b"\n"].concat());
        for damage in damages {
            fs::write(&path, &damage).expect("damage it");
            let error = Epoch::open(scratch.path()).expect_err("damaged");
            assert!(
                error.hint.contains("delete the file"),
                "{:?}",
                String::from_utf8_lossy(&damage)
            );
        }
        fs::write(&path, &whole).expect("repair it");
        assert_eq!(Epoch::open(scratch.path()).expect("whole again").newest(), 42);
    }

    #[test]
    fn an_epoch_that_cannot_be_written_does_not_count() {
        let scratch = scratch();
        let mut epoch = Epoch::open(scratch.path()).expect("open");
        fs::create_dir(scratch.path().join("epoch.tmp")).expect("in the way");
        epoch.raise(9).expect_err("not written");
        assert_eq!(epoch.newest(), 0);
    }
}
