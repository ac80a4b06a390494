//! Event files for TensorBoard: TFRecord files of `tensorflow.Event` messages, of which only what scalars need is written.
//!
//! A record is the length of its message (8 bytes, little endian), the masked CRC-32C of these, the message, and its masked
//! CRC-32C: <https://www.tensorflow.org/tutorials/load_data/tfrecord>. A file that ends inside a record is normal to its
//! readers; they wait for the rest.
//!
//! A training that resumes begins a file of its own. It opens with a session's start at the first step that is to come: readers
//! forget what older files say of that step and later ones, which are trained again.

use arcface_proto::v1::{Evaluation, StepMetrics};
use prost::{Message, Oneof};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Directory of the files inside the output directory.
const DIRECTORY: &str = "tensorboard";
/// `SessionLog.SessionStatus.START`
const START: i32 = 1;

/// `tensorflow.Event`
#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since the Unix epoch.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

/// `tensorflow.Summary`
#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Scalar>,
}

/// `tensorflow.Summary.Value`
#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    /// One of several kinds of value: written even if it is 0.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// `tensorflow.SessionLog`
#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// An open file.
pub struct Events {
    file: File,
}

impl Events {
    /// Begins a file below the output directory, of a training that begins after `start` steps.
    ///
    /// # Errors
    /// What the system says.
    pub fn create(output: &Path, start: u64) -> io::Result<Self> {
        let folder = output.join(DIRECTORY);
        fs::create_dir_all(&folder)?;
        let now = since_epoch();
        // Readers go through the files in the order of their names.
        let name = format!(
            "events.out.tfevents.{:010}.{:09}",
            now.as_secs(),
            now.subsec_nanos()
        );
        let mut events = Self {
            file: File::create_new(folder.join(name))?,
        };
        events.write(0, What::FileVersion("brain.Event:2".into()))?;
        events.write(start + 1, What::SessionLog(SessionLog { status: START }))?;
        Ok(events)
    }

    /// An interval.
    pub fn metrics(&mut self, metrics: &StepMetrics) {
        let always = [
            ("train/loss", metrics.loss),
            ("train/learning_rate", metrics.learning_rate),
            ("train/samples_per_second", metrics.samples_per_second),
            ("train/step_seconds", metrics.step_seconds),
            ("train/grad_norm", metrics.grad_norm),
        ];
        let sometimes = [
            ("train/loss_scale", metrics.loss_scale),
            ("train/embedding_norm", metrics.embedding_norm),
            ("train/target_cosine", metrics.target_cosine),
            (
                "train/skipped_steps",
                metrics.skipped_steps.map(|steps| steps as f64),
            ),
            ("checkpoint/stall_seconds", metrics.checkpoint_stall_seconds),
        ];
        let sometimes = sometimes
            .into_iter()
            .filter_map(|(tag, value)| Some((tag, value?)));
        let named = always.into_iter().chain(sometimes);
        let phases: BTreeMap<_, _> = metrics.phase_seconds.iter().collect();
        let phases = phases
            .into_iter()
            .map(|(phase, seconds)| (format!("phase_seconds/{phase}"), *seconds));
        let scalars = named.map(|(tag, value)| (tag.to_owned(), value)).chain(phases);
        self.scalars(metrics.step, scalars);
    }

    /// An evaluation.
    pub fn evaluation(&mut self, evaluation: &Evaluation) {
        let tag = |name: &str| format!("eval/{}/{name}", evaluation.dataset);
        let rates: BTreeMap<_, _> = evaluation.tar_at_far.iter().collect();
        let rates = rates
            .into_iter()
            .map(|(far, rate)| (tag(&format!("tar_at_far_{far}")), *rate));
        let scalars = [
            (tag("accuracy"), evaluation.accuracy),
            (tag("xnorm"), evaluation.xnorm),
        ];
        self.scalars(evaluation.step, scalars.into_iter().chain(rates));
    }

    fn scalars(&mut self, step: u64, scalars: impl Iterator<Item = (String, f64)>) {
        let scalar = |(tag, value): (String, f64)| Scalar {
            tag,
            simple_value: Some(value as f32),
        };
        let value = scalars.map(scalar).collect();
        // A full disk must not end the training; the numbers are in the rank's own log.
        let _lost = self.write(step, What::Summary(Summary { value }));
    }

    fn write(&mut self, step: u64, what: What) -> io::Result<()> {
        let event = Event {
            wall_time: since_epoch().as_secs_f64(),
            step: i64::try_from(step).unwrap_or(i64::MAX),
            what: Some(what),
        };
        // One write, so that a record is whole unless the machine dies.
        self.file.write_all(&record(&event.encode_to_vec()))
    }
}

fn since_epoch() -> Duration {
    // A clock before 1970 shows as 1970.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn record(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(message.len() + 16);
    record.extend(length);
    record.extend(masked(crc32c(&length)).to_le_bytes());
    record.extend(message);
    record.extend(masked(crc32c(message)).to_le_bytes());
    record
}

/// What TFRecord makes of a checksum: a checksum of data that has checksums in it would be weak.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli, RFC 3720 appendix B.4), bit by bit: a record is some hundred bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    let add = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg())
        })
    };
    !bytes.iter().fold(u32::MAX, add)
}

#[cfg(test)]
mod tests;
