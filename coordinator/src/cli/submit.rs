//! `submit`: reads and checks a job file, sends it, and follows the job if asked to.

use super::follow::{self, Attached};
use super::{Complaints, Format, Outcome, Target, json, output, output::Output, say, words};
use crate::spec::{self, JobFile};
use arcface_proto::failure::{ExitCode, Failure};
use arcface_proto::{convert, v1};
use clap::Args;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Largest job file. The longest sensible one has a few hundred lines.
const LONGEST_FILE: u64 = 1 << 20;

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  arcface-coordinator submit configs/demo_cpu.toml --follow
  arcface-coordinator submit configs/ms1mv3_r50.toml --set head.sample_rate=0.1 --set job.world_size=4")]
pub(super) struct SubmitArgs {
    #[command(flatten)]
    job: JobArgs,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    format: Format,
    /// Stay until the job ends, showing its progress
    #[arg(long, conflicts_with = "dry_run")]
    follow: bool,
    /// Makes the submit idempotent: the same id gives the same job again [default: a new one]
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    /// Check the file and print the job with every default filled in; submit nothing
    #[arg(long)]
    dry_run: bool,
}

/// A job file and what changes it.
#[derive(Args, Debug)]
pub(super) struct JobArgs {
    /// Job file (TOML)
    #[arg(value_name = "JOB.toml")]
    pub file: PathBuf,
    /// Set one key of the job file: section.key=value, the value in TOML, bare words are strings
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

impl JobArgs {
    /// The job, checked.
    pub fn read(&self) -> anyhow::Result<JobFile> {
        let text = read_text(
            "job",
            &self.file,
            "job files of the known recipes are in configs/",
        )?;
        Ok(spec::parse(&text, &self.set).map_err(|error| Complaints::of_job_file(&self.file, error))?)
    }
}

/// A file that a person wrote: the kind it should be of, and where there are such files.
pub(super) fn read_text(kind: &str, path: &Path, where_they_are: &str) -> Result<String, Failure> {
    let fail = |code, what: &str| Failure::new(code, format!("{kind} {}: {what}", path.display()));
    let unreadable = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => fail(ExitCode::NotFound, "no such file").hint(where_they_are),
        io::ErrorKind::IsADirectory => {
            fail(ExitCode::Usage, "is a directory").hint(format!("name the {kind} file in it"))
        }
        io::ErrorKind::InvalidData => fail(ExitCode::Usage, "is not UTF-8 text"),
        kind => fail(ExitCode::NotFound, &format!("cannot be read: {kind}")),
    };
    let mut text = String::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(LONGEST_FILE + 1)
        .read_to_string(&mut text)
        .map_err(unreadable)?;
    if text.len() as u64 > LONGEST_FILE {
        return Err(fail(
            ExitCode::Usage,
            &format!("is larger than {}", words::bytes(LONGEST_FILE)),
        ));
    }
    Ok(text)
}

pub(super) async fn run(args: SubmitArgs) -> anyhow::Result<Outcome> {
    let JobFile { wire, spec } = args.job.read()?;
    if args.dry_run {
        let filled = convert::job_spec_to_wire(&spec);
        match args.format.output {
            Output::Table => output::print(&toml::to_string(&filled)?)?,
            Output::Json => output::print_json(&serde_json::to_value(&filled)?)?,
        }
        return Ok(Outcome::Done);
    }
    let coordinator = args.target.connect().await?;
    let request_id = args
        .request_id
        .unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    let job: v1::Job = coordinator.submit(request_id, wire).await?;
    if args.follow {
        say(&format!("submitted {} ({})", job.id, spec.name));
        let attached = Attached {
            coordinator,
            job_id: job.id,
            output: args.format.output,
        };
        return follow::until_end(attached).await;
    }
    match args.format.output {
        Output::Table => {
            output::print(&format!("{}\n", job.id))?;
            say(&format!(
                "submitted {}; follow it with: {}",
                spec.name,
                follow::attach_command(&job.id, &args.target.coordinator.join(","))
            ));
        }
        Output::Json => output::print_json(&json::job_summary(&job))?,
    }
    Ok(Outcome::Done)
}
