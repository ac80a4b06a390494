//! `manifest.json` beside the parts: the committed manifest, so that a checkpoint can be checked and used without
//! the coordinator's store. Its field `digest` is the BLAKE3 digest of the rest.

use super::{CheckpointError, PartKind, reshard};
use arcface_proto::{
    types::ClassRange,
    v1::{CheckpointManifest, CheckpointPart},
};
use std::{fs::File, io::Read, path::Path};

/// Version of the layout that this program writes and reads.
pub const FORMAT: u32 = 1;

/// Name of the file.
pub const FILE: &str = "manifest.json";

/// Largest manifest that is read, in bytes: 100,000 parts.
const MAX_BYTES: u64 = 32 << 20;

/// The manifest's text, with its digest.
pub(super) fn to_json(manifest: &CheckpointManifest) -> Result<Vec<u8>, serde_json::Error> {
    let mut json = serde_json::to_value(manifest)?;
    json["digest"] = digest(manifest)?.into();
    let mut text = serde_json::to_vec_pretty(&json)?;
    text.push(b'\n');
    Ok(text)
}

/// Reads `dir/manifest.json` and checks that nothing of it changed and that it makes sense.
pub fn read_manifest(dir: &Path) -> Result<CheckpointManifest, CheckpointError> {
    let path = dir.join(FILE);
    let mut text = Vec::new();
    let read = File::open(&path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut text));
    read.map_err(CheckpointError::io("read", &path, 0))?;
    if text.len() as u64 > MAX_BYTES {
        return Err(CheckpointError::layout(
            &path,
            format!("larger than {MAX_BYTES} bytes"),
        ));
    }
    parse(&path, &text)
}

/// Reads a manifest's text; `path` names it in errors.
pub fn parse(path: &Path, text: &[u8]) -> Result<CheckpointManifest, CheckpointError> {
    let broken = |error: serde_json::Error| CheckpointError::layout(path, format!("no manifest: {error}"));
    let json: serde_json::Value = serde_json::from_slice(text).map_err(broken)?;
    let stated = json["digest"].as_str().unwrap_or("none").to_owned();
    let format = json["format"].as_u64().unwrap_or(0);
    if format > u64::from(FORMAT) {
        return Err(CheckpointError::Version {
            path: path.to_owned(),
            expected: FORMAT,
            got: u32::try_from(format).unwrap_or(u32::MAX),
        });
    }
    let manifest: CheckpointManifest = serde_json::from_value(json).map_err(broken)?;
    let got = digest(&manifest).map_err(broken)?;
    if got != stated {
        return Err(CheckpointError::Digest {
            path: path.to_owned(),
            zeros: None,
            expected: stated,
            got,
        });
    }
    validate(path, &manifest)?;
    Ok(manifest)
}

fn digest(manifest: &CheckpointManifest) -> Result<String, serde_json::Error> {
    let bytes = serde_json::to_vec(manifest)?;
    Ok(blake3::hash(&bytes).to_hex().to_string())
}

/// Checks that a manifest describes a whole checkpoint: the version, one backbone, head parts that hold every class
/// once, file names that are ours. `path` names it in errors.
pub fn validate(path: &Path, manifest: &CheckpointManifest) -> Result<(), CheckpointError> {
    if manifest.format != FORMAT {
        return Err(CheckpointError::Version {
            path: path.to_owned(),
            expected: FORMAT,
            got: manifest.format,
        });
    }
    let refuse = |detail: String| Err(CheckpointError::layout(path, detail));
    let mut heads = Vec::new();
    let mut backbones = 0;
    for part in &manifest.parts {
        let digits = part.blake3.len() == 64 && part.blake3.bytes().all(|b| b.is_ascii_hexdigit());
        if !digits {
            return refuse(format!("{}: {:?} is no BLAKE3 digest", part.file, part.blake3));
        }
        match kind(part) {
            Some(PartKind::Backbone) => backbones += 1,
            Some(PartKind::Head(classes)) => heads.push(classes),
            None => {
                return refuse(format!(
                    "part {:?} of classes {}..{} is not known",
                    part.file, part.class_lo, part.class_hi
                ));
            }
        }
    }
    if backbones != 1 {
        return refuse(format!("{backbones} backbone parts, expected 1"));
    }
    let all = ClassRange {
        lo: 0,
        hi: manifest.num_classes,
    };
    if let Err(error) = reshard::pieces(all, &heads) {
        return refuse(format!("head parts do not hold classes {all}: {error}"));
    }
    match heads.iter().find(|part| part.hi > all.hi) {
        Some(part) => refuse(format!(
            "a head part holds classes {part}, but there are {}",
            all.hi
        )),
        None => Ok(()),
    }
}

/// What a part is; nothing if its file name does not fit.
pub(super) fn kind(part: &CheckpointPart) -> Option<PartKind> {
    let classes = ClassRange {
        lo: part.class_lo,
        hi: part.class_hi,
    };
    [PartKind::Backbone, PartKind::Head(classes)]
        .into_iter()
        .find(|kind| kind.file() == part.file && kind.classes() == classes && classes.lo <= classes.hi)
}
