//! Reading from an object store: in requests of bounded size, several at once, in order. Each has retries of its own, so that
//! a large part does not depend on one connection.

use super::super::{Checkpoint, CheckpointError};
use super::remote::{Meter, Remote};
use arcface_proto::{
    types::ClassRange,
    v1::{CheckpointManifest, CheckpointPart},
};
use object_store::{Error, ObjectStore, ObjectStoreExt};
use std::{
    collections::VecDeque,
    fs::File,
    io::{Seek, Write},
    sync::Arc,
};
use tracing::{info, warn};

/// Requests on their way at once; their answers are the memory of a download: 64 MiB.
const AT_ONCE: usize = 4;
/// How often a part with other contents than were committed is fetched before it counts as damaged: once may have been the way.
const TRIES: usize = 2;

impl Remote {
    /// Fetches what a rank with these classes reads of a checkpoint; `folder` is that of the job.
    pub(super) fn fetch_checkpoint(
        &self,
        manifest: &CheckpointManifest,
        classes: ClassRange,
        folder: &str,
        alive: &dyn Fn(),
    ) -> Result<Checkpoint, CheckpointError> {
        let directory = &manifest.directory;
        let dir = self.path(directory, "");
        Checkpoint::fetched(&dir, manifest.clone(), classes, &mut |part| {
            info!(
                "fetching {} ({} bytes)",
                self.path(directory, &part.file).display(),
                part.bytes
            );
            self.fetch_part(directory, part, alive)
                .map_err(|error| self.told_apart(error, folder))
        })
    }

    /// A part in a temporary file that has no name, after its size and digest were compared.
    fn fetch_part(
        &self,
        directory: &str,
        part: &CheckpointPart,
        alive: &dyn Fn(),
    ) -> Result<File, CheckpointError> {
        let scratch = |error: std::io::Error| CheckpointError::Scratch {
            dir: std::env::temp_dir(),
            detail: format!("{} of {} bytes: {error}", part.file, part.bytes),
        };
        let mut got = String::new();
        for _ in 0..TRIES {
            let mut file = tempfile::tempfile().map_err(scratch)?;
            got = self.read(directory, part, &mut |bytes| {
                alive();
                file.write_all(bytes).map_err(scratch)
            })?;
            if got.eq_ignore_ascii_case(&part.blake3) {
                file.rewind().map_err(scratch)?;
                return Ok(file);
            }
            warn!("{}: BLAKE3 is {got}", self.path(directory, &part.file).display());
        }
        Err(CheckpointError::Digest {
            path: self.path(directory, &part.file),
            zeros: None,
            expected: part.blake3.clone(),
            got,
        })
    }

    /// Gives the bytes of a part to `sink`, in order; the result is their digest. An object of another size is an error.
    pub(super) fn read(
        &self,
        directory: &str,
        part: &CheckpointPart,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), CheckpointError>,
    ) -> Result<String, CheckpointError> {
        let name = self.name(directory, &part.file)?;
        let failed = |error| self.failed("read", directory, &part.file, &error);
        let of_size = |got| match got == part.bytes {
            true => Ok(()),
            false => Err(CheckpointError::Size {
                path: self.path(directory, &part.file),
                expected: part.bytes,
                got,
            }),
        };
        let mut meter = Meter::new("reading", self.path(directory, &part.file), part.bytes);
        let mut hasher = blake3::Hasher::new();
        self.runtime.block_on(async {
            of_size(self.store.head(&name).await.map_err(failed)?.size)?;
            let mut starts = (0..part.bytes).step_by(self.piece as usize);
            let mut requests = VecDeque::new();
            let mut done = 0;
            loop {
                while requests.len() < AT_ONCE
                    && let Some(start) = starts.next()
                {
                    let range = start..(start + self.piece).min(part.bytes);
                    let (store, name): (Arc<dyn ObjectStore>, _) = (self.store.clone(), name.clone());
                    requests.push_back(tokio::spawn(async move { store.get_range(&name, range).await }));
                }
                let Some(next) = requests.pop_front() else { break };
                let bytes = next.await.map_err(Error::from).flatten().map_err(failed)?;
                hasher.update(&bytes);
                sink(&bytes)?;
                done += bytes.len() as u64;
                meter.add(bytes.len() as u64);
            }
            of_size(done)
        })?;
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// An object that is not there is damage, unless nothing of the job is: then this node looks at another bucket or
    /// endpoint than the one that wrote the checkpoint.
    fn told_apart(&self, error: CheckpointError, folder: &str) -> CheckpointError {
        let CheckpointError::Store {
            operation,
            path,
            detail,
            gone: true,
        } = error
        else {
            return error;
        };
        let (gone, detail) = match self.any(folder) {
            Ok(true) => (true, detail),
            Ok(false) => (false, format!("{detail}; nothing at all is in {self}/{folder}")),
            Err(unknown) => (false, format!("{detail}; {unknown}")),
        };
        CheckpointError::Store {
            operation,
            path,
            detail,
            gone,
        }
    }
}
