//! Compiles the `.proto` files without a `protoc` command and derives serde for the messages that also live
//! in files: the job file (TOML) and what agents hand to ranks (JSON).

use prost::Message;
use std::{env, fs, path::PathBuf};

const PROTOS: [&str; 4] = [
    "arcface/v1/job.proto",
    "arcface/v1/cluster.proto",
    "arcface/v1/worker.proto",
    "arcface/v1/rank.proto",
];

/// Sections of the job file: unknown keys are errors there.
const JOB_FILE: [&str; 12] = [
    "JobSpec",
    "JobSection",
    "ModelSection",
    "HeadSection",
    "AdaFaceSection",
    "MagFaceSection",
    "CurricularFaceSection",
    "SubCenterSection",
    "DataSection",
    "TrainSection",
    "EvalSection",
    "CheckpointSection",
];

/// Messages written as JSON, by us and for us.
const JSON: [&str; 6] = [
    "RankAssignment",
    "PartCopies",
    "CheckpointManifest",
    "CheckpointDamage",
    "CheckpointPart",
    "LossScaler",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let descriptors = protox::compile(PROTOS, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("arcface_descriptor.bin"), descriptors.encode_to_vec())?;

    let mut config = tonic_prost_build::configure().build_transport(false);
    for message in JOB_FILE {
        let path = format!(".arcface.v1.{message}");
        config = config
            .type_attribute(&path, "#[derive(serde::Serialize, serde::Deserialize)]")
            .type_attribute(&path, "#[serde(default, deny_unknown_fields)]")
            .field_attribute(&path, "#[serde(skip_serializing_if = \"crate::skip::unset\")]");
    }
    for message in JSON {
        config = config.type_attribute(
            format!(".arcface.v1.{message}"),
            "#[derive(serde::Serialize, serde::Deserialize)] #[serde(default)]",
        );
    }
    for time in ["CheckpointManifest.committed_at", "CheckpointDamage.found_at"] {
        config = config.field_attribute(
            format!(".arcface.v1.{time}"),
            "#[serde(with = \"crate::timestamp\")]",
        );
    }
    // Manifests without these keep the bytes, and so the digest, that they had before the fields were known.
    for later in ["scaler", "damage", "num_image"] {
        config = config.field_attribute(
            format!(".arcface.v1.CheckpointManifest.{later}"),
            "#[serde(skip_serializing_if = \"Option::is_none\")]",
        );
    }
    config.compile_fds(descriptors)?;
    for proto in PROTOS {
        println!("cargo:rerun-if-changed={proto}");
    }
    Ok(())
}
