//! Where a job's checkpoints lie: in a directory, through the crash-proof writer of [`super::write`], or in an object store.
//! Both keep the same promises: what a rank was told is there was read again and is durable, a manifest comes last and goes
//! first, and nothing is used before it was verified.

mod download;
mod remote;
mod upload;

use super::{Checkpoint, CheckpointError, NamedTensor, PartKind, disk::Real, write};
use arcface_proto::{
    types::{ClassRange, JobId},
    v1::{CheckpointManifest, CheckpointPart},
};
pub use remote::Remote;
use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Folder of the checkpoints in a job's output directory.
const IN_OUTPUT: &str = "checkpoints";

/// Where a job's checkpoints lie. Clones are the same place.
#[derive(Clone, Debug)]
pub struct Location {
    base: Base,
    folder: String,
}

#[derive(Clone, Debug)]
enum Base {
    Local(PathBuf),
    Remote(Arc<Remote>),
}

impl Location {
    /// The output directory of a job.
    pub fn output(output: &Path) -> Self {
        Self {
            base: Base::Local(output.to_owned()),
            folder: IN_OUTPUT.into(),
        }
    }

    /// A directory that jobs share, with a folder for each.
    pub fn shared(dir: &Path, job: &JobId) -> Self {
        Self {
            base: Base::Local(dir.to_owned()),
            folder: job.as_str().into(),
        }
    }

    /// An object store that jobs share, likewise.
    pub fn remote(store: Remote, job: &JobId) -> Self {
        Self {
            base: Base::Remote(Arc::new(store)),
            folder: job.as_str().into(),
        }
    }

    /// Directory of the checkpoint `name` as its manifest has it: relative to this location.
    pub fn directory(&self, name: &str) -> String {
        format!("{}/{name}", self.folder)
    }

    /// Asks whether checkpoints of the job can be kept here, as far as reading can tell.
    ///
    /// # Errors
    /// If an object store does not answer, or refuses: better now than at the first checkpoint.
    pub fn check(&self) -> Result<(), CheckpointError> {
        match &self.base {
            Base::Local(_) => Ok(()),
            Base::Remote(store) => store.any(&self.folder).map(drop),
        }
    }

    /// Writes one part of the checkpoint in `directory`, see [`write::write_part`]. When this returns, the part is durable, was
    /// read again, and is described by the result. After an error nobody can commit it; [`Self::remove`] takes away what there
    /// may be of it. `alive` is called as bytes go out and come back.
    pub fn write_part(
        &self,
        directory: &str,
        kind: PartKind,
        tensors: &[NamedTensor],
        alive: &dyn Fn(),
    ) -> Result<CheckpointPart, CheckpointError> {
        match &self.base {
            Base::Local(base) => write::write_part_on(&Real, &base.join(directory), kind, tensors, alive),
            Base::Remote(store) => store.write_part(directory, kind, tensors, alive),
        }
    }

    /// Makes the place, and its own name durable: what is written in it later would be lost with that.
    pub fn make(&self) -> Result<(), CheckpointError> {
        match &self.base {
            Base::Local(base) => write::make_place(&base.join(&self.folder)),
            Base::Remote(_) => Ok(()),
        }
    }

    /// Puts a committed manifest beside its parts.
    pub fn write_manifest(&self, manifest: &CheckpointManifest) -> Result<(), CheckpointError> {
        match &self.base {
            Base::Local(base) => write::write_manifest(&base.join(&manifest.directory), manifest),
            Base::Remote(store) => store.write_manifest(manifest),
        }
    }

    /// Removes the checkpoint in `directory`, its manifest first, see [`write::remove`].
    pub fn remove(&self, directory: &str) -> Result<(), CheckpointError> {
        match &self.base {
            Base::Local(base) => write::remove(base, directory),
            Base::Remote(store) => store.remove(directory),
        }
    }

    /// Names of the directories here.
    pub fn names(&self) -> Result<Vec<String>, CheckpointError> {
        match &self.base {
            Base::Local(base) => write::names(&base.join(&self.folder)),
            Base::Remote(store) => store.names(&self.folder),
        }
    }

    /// The manifest beside the parts of a directory; none if there is none.
    pub fn manifest_of(&self, directory: &str) -> Result<Option<CheckpointManifest>, CheckpointError> {
        match &self.base {
            Base::Local(base) => write::manifest_of(&base.join(directory)),
            Base::Remote(store) => store.manifest_of(directory),
        }
    }

    /// Opens a committed checkpoint for a rank with these classes, and verifies all that it will read of it. From an object
    /// store only that is fetched, into temporary files without a name, which vanish with the result or the process.
    /// `alive` is called as bytes come in.
    pub fn open(
        &self,
        manifest: &CheckpointManifest,
        classes: ClassRange,
        alive: &dyn Fn(),
    ) -> Result<Checkpoint, CheckpointError> {
        match &self.base {
            Base::Local(base) => {
                let checkpoint = Checkpoint::open(&base.join(&manifest.directory), manifest.clone())?;
                checkpoint.verify_for(classes)?;
                Ok(checkpoint)
            }
            Base::Remote(store) => store.fetch_checkpoint(manifest, classes, &self.folder, alive),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.base {
            Base::Local(base) => write!(f, "{}/{}", base.display(), self.folder),
            Base::Remote(store) => write!(f, "{store}/{}", self.folder),
        }
    }
}
