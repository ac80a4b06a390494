//! How a new generation gets the copies that it resumes from: what this node's memory has is used from there, the rest
//! comes from ranks on the nodes that have it.

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::collective::{Session, parts};
use crate::rank::failure::RankFailure;
use arcface_proto::types::ClassRange;
use arcface_proto::v1::{CheckpointManifest, CheckpointPart, PartCopies};
use std::fs::File;
use std::io;
use std::path::Path;
use tracing::info;

/// The set of copies that `manifest` describes, with all that a rank with these classes reads of it, verified, in this
/// node's memory: the job's folder there is `home`. `copies` says which nodes have which part, `ranks` has the node and the
/// endpoint for parts of every rank.
///
/// # Errors
/// If a part cannot be had whole from anywhere: the set is of no use then.
pub fn gather(
    home: &Path,
    session: &Session,
    manifest: &CheckpointManifest,
    copies: &[PartCopies],
    classes: ClassRange,
    ranks: &[(String, String)],
) -> Result<Checkpoint, RankFailure> {
    let folder = home.join(&manifest.directory);
    std::fs::create_dir_all(&folder).map_err(|error| RankFailure::copies(manifest, "", &error))?;
    let (mut fetched, mut bytes) = (0, 0);
    let set = Checkpoint::fetched(&folder, manifest.clone(), classes, &mut |part| {
        let path = folder.join(&part.file);
        if !is_whole(&path, part) {
            let holders = copies.iter().find(|copies| copies.file == part.file);
            let holders = holders.map_or(&[][..], |copies| &copies.nodes);
            fetch(&path, session, manifest, part, holders, ranks)
                .map_err(|why| CheckpointError::layout(&path, why))?;
            fetched += 1;
            bytes += part.bytes;
        }
        File::open(&path).map_err(CheckpointError::io("open", &path, part.bytes))
    });
    let set = set.map_err(|error| {
        let file = error.path().and_then(|path| path.file_name()?.to_str());
        RankFailure::copies(manifest, file.unwrap_or_default(), &error)
    })?;
    info!(
        step = manifest.step,
        fetched, bytes, "resumes from copies in memory, of which parts came from other nodes"
    );
    Ok(set)
}

/// True if a file is what the manifest says. One that is not is as good as none.
fn is_whole(path: &Path, part: &CheckpointPart) -> bool {
    let mut hasher = blake3::Hasher::new();
    let read = File::open(path).and_then(|mut file| io::copy(&mut file, &mut hasher));
    read.is_ok_and(|bytes| bytes == part.bytes)
        && hasher.finalize().to_hex().eq_ignore_ascii_case(&part.blake3)
}

/// Gets a part from the first rank that has it.
fn fetch(
    path: &Path,
    session: &Session,
    manifest: &CheckpointManifest,
    part: &CheckpointPart,
    holders: &[String],
    ranks: &[(String, String)],
) -> Result<(), String> {
    let name = format!("{}/{}", manifest.directory, part.file);
    let mut last = "no rank is on a node that has it".to_owned();
    for (node, endpoint) in ranks.iter().filter(|(node, _)| holders.contains(node)) {
        let got = parts::get(endpoint, session, &name, path);
        last = match got {
            Ok(()) if is_whole(path, part) => return Ok(()),
            Ok(()) => format!("{node} has another file of that name"),
            Err(error) => format!("{node} at {endpoint}: {error}"),
        };
    }
    Err(last)
}
