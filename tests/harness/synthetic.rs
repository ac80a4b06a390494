//! Small inputs that every cluster test uses: drawn identities and a job file for them.

use crate::{Finished, command};
use anyhow::Result;
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// A job file for the smallest network, as the test describes it.
#[derive(Clone, Debug)]
pub struct JobFile {
    /// Job's name and the last part of its output directory.
    pub name: String,
    /// Ranks.
    pub world_size: u32,
    /// Further lines of `[job]`.
    pub job: String,
    /// `data.rec`; with "synthetic" the identities are drawn while training.
    pub rec: String,
    /// Images.
    pub num_image: u64,
    /// Identities.
    pub num_classes: u32,
    /// Samples per rank and step.
    pub batch_size: u32,
    /// Epochs.
    pub num_epoch: u32,
    /// Steps between checkpoints; 0 is at the end of every epoch.
    pub checkpoint_steps: u32,
    /// Learning rate.
    pub lr: f64,
    /// `train.on_nonfinite`.
    pub on_nonfinite: &'static str,
    /// Lines for the end of the file, such as `[eval]`.
    pub more: String,
}

impl JobFile {
    /// Two ranks, 64 drawn images of 8 identities, batches of 8 a rank: 4 steps an epoch.
    pub fn tiny(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            world_size: 2,
            job: String::new(),
            rec: "synthetic".into(),
            num_image: 64,
            num_classes: 8,
            batch_size: 8,
            num_epoch: 2,
            checkpoint_steps: 0,
            lr: 0.01,
            on_nonfinite: "stop",
            more: String::new(),
        }
    }

    /// The same with another number of epochs.
    pub fn epochs(mut self, num_epoch: u32) -> Self {
        self.num_epoch = num_epoch;
        self
    }

    /// The file's text.
    pub fn text(&self) -> String {
        let Self {
            name,
            world_size,
            job,
            rec,
            num_image,
            num_classes,
            batch_size,
            num_epoch,
            checkpoint_steps,
            lr,
            on_nonfinite,
            more,
        } = self;
        format!(
            "output = \"out/{name}\"\n\
             [job]\nname = \"{name}\"\nworld_size = {world_size}\n{job}\
             [model]\nnetwork = \"tiny\"\nembedding_size = 32\n\
             [head]\nnum_classes = {num_classes}\n\
             [data]\nrec = \"{rec}\"\nnum_image = {num_image}\nnum_workers = 1\n\
             [train]\nbatch_size = {batch_size}\nnum_epoch = {num_epoch}\nlr = {lr:e}\nfrequent = 1\n\
             on_nonfinite = \"{on_nonfinite}\"\n\
             [checkpoint]\nevery_steps = {checkpoint_steps}\n{more}\n"
        )
    }

    /// Writes it into a directory.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, directory: &Path) -> Result<PathBuf> {
        let path = directory.join(format!("{}.toml", self.name));
        fs::write(&path, self.text())?;
        Ok(path)
    }
}

/// Draws identities into a folder below `scratch` (`train.rec`, `train.idx`) and pairs of others (`synth.bin`).
///
/// # Errors
/// If `arcface-worker data synth` fails.
pub fn write_identities(
    scratch: &Path,
    folder: &str,
    identities: u32,
    images_each: u32,
    pairs: u32,
) -> Result<()> {
    let mut command = command("arcface-worker", scratch)?;
    command
        .args(["data", "synth", "--output", folder])
        .args(["--identities", &identities.to_string()])
        .args(["--images-per-identity", &images_each.to_string()])
        .args(["--pairs", &pairs.to_string()]);
    Finished::of(command, Duration::from_secs(60))?.expect(0)?;
    Ok(())
}
