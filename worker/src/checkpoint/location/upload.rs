//! Writing a part to an object store. An object appears whole when its upload is complete, so it needs no temporary name;
//! an upload that fails is aborted. Then the part is read again and compared with the digest of what was meant.

use super::super::{CheckpointError, NamedTensor, PartKind, write::Encoding};
use super::remote::{Meter, Remote};
use arcface_proto::v1::CheckpointPart;
use object_store::{Error, ObjectStoreExt, WriteMultipart, path::Path as ObjectPath};
use tracing::warn;

/// Pieces on their way at once. With the one that is being filled they are the memory of an upload: 80 MiB.
const AT_ONCE: usize = 4;
/// Pieces of an object; S3 has a limit of 10,000.
const MOST_PIECES: u64 = 9_000;

impl Remote {
    /// Writes one part and reads it again.
    pub(super) fn write_part(
        &self,
        directory: &str,
        kind: PartKind,
        tensors: &[NamedTensor],
        alive: &dyn Fn(),
    ) -> Result<CheckpointPart, CheckpointError> {
        let part = Encoding::new(&self.path(directory, ""), kind, tensors)?;
        let file = part.file.clone();
        let name = self.name(directory, &file)?;
        let failed = |error| self.failed("write", directory, &file, &error);
        let mut meter = Meter::new("uploading", self.path(directory, &file), part.bytes);
        let mut upload = Upload::begin(self, &name, part.bytes).map_err(failed)?;
        let digest = part.write(&mut |chunk| {
            alive();
            meter.add(chunk.len() as u64);
            upload.write(chunk).map_err(failed)
        })?;
        upload.finish().map_err(failed)?;

        let part = part.described(digest);
        let got = self.read(directory, &part, &mut |_| {
            alive();
            Ok(())
        })?;
        if got != part.blake3 {
            self.discard(&name);
            return Err(CheckpointError::Digest {
                path: self.path(directory, &file),
                zeros: None,
                expected: part.blake3,
                got,
            });
        }
        Ok(part)
    }
}

/// An object on its way up; dropped before its end it is aborted.
struct Upload<'r> {
    remote: &'r Remote,
    name: &'r ObjectPath,
    state: State,
}

enum State {
    /// Small enough for one request.
    Whole(Vec<u8>),
    Pieces(WriteMultipart),
    Ended,
}

impl<'r> Upload<'r> {
    fn begin(remote: &'r Remote, name: &'r ObjectPath, bytes: u64) -> Result<Self, Error> {
        let state = if bytes <= remote.piece {
            State::Whole(Vec::with_capacity(bytes as usize))
        } else {
            let piece = remote.piece.max(bytes.div_ceil(MOST_PIECES)) as usize;
            let begun = remote.runtime.block_on(remote.store.put_multipart(name))?;
            State::Pieces(WriteMultipart::new_with_chunk_size(begun, piece))
        };
        Ok(Self { remote, name, state })
    }

    fn write(&mut self, chunk: &[u8]) -> Result<(), Error> {
        match &mut self.state {
            State::Whole(bytes) => bytes.extend_from_slice(chunk),
            State::Pieces(pieces) => {
                self.remote.runtime.block_on(pieces.wait_for_capacity(AT_ONCE))?;
                // A full piece becomes a task.
                let _runtime = self.remote.runtime.enter();
                pieces.write(chunk);
            }
            State::Ended => {}
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(), Error> {
        let Self { remote, name, .. } = self;
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Whole(bytes) => remote
                .runtime
                .block_on(remote.store.put(name, bytes.into()))
                .map(drop),
            // Aborts by itself if it fails.
            State::Pieces(pieces) => remote.runtime.block_on(pieces.finish()).map(drop),
            State::Ended => Ok(()),
        }
    }
}

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        if let State::Pieces(pieces) = std::mem::replace(&mut self.state, State::Ended)
            && let Err(error) = self.remote.runtime.block_on(pieces.abort())
        {
            warn!(
                "pieces of {}/{} may be left in the store: {error}",
                self.remote, self.name
            );
        }
    }
}
