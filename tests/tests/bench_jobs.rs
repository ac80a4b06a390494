//! `bench/jobs.py` with tiny sizes: every row runs whole jobs, and is in the file and in the table.

use anyhow::{Context, Result, ensure};
use arcface_tests::{Finished, binary, workspace};
use serde_json::Value;
use std::{fs, path::Path, process::Command, time::Duration};

const MEASURED: Duration = Duration::from_secs(300);

fn jobs(scratch: &Path, bin: &Path, arguments: &[&str]) -> Result<Finished> {
    let mut command = Command::new("python3");
    command
        .current_dir(scratch)
        .args(["-sB".as_ref(), workspace().join("bench/jobs.py").as_os_str()])
        .args(["--output", "jobs.json", "--bin"])
        .arg(bin)
        .args(arguments)
        .env_remove("ARCFACE_COORDINATOR")
        .env("BENCH_QUICK", "1")
        .env("OMP_NUM_THREADS", "1");
    Finished::of(command, MEASURED)
}

#[test]
fn every_row_runs_whole_jobs_and_is_in_the_table() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let bin = binary("arcface-worker")?.parent().context("a folder")?.to_owned();
    jobs(scratch.path(), &bin, &[])?.expect(0)?;
    let file: Value = serde_json::from_str(&fs::read_to_string(scratch.path().join("jobs.json"))?)?;
    let table = fs::read_to_string(scratch.path().join("jobs.md"))?;
    let rows = file["rows"].as_object().context("rows")?;
    ensure!(rows.len() == 5, "{rows:#?}");
    for (name, row) in rows {
        ensure!(table.contains(&format!("`{name}`")), "{name}: {table}");
        let number = |key: &str| {
            row["result"][key]
                .as_f64()
                .with_context(|| format!("{name}: {row}"))
        };
        if name.starts_with("accuracy") {
            let difference = (number("fast")? - number("plain")?).abs();
            ensure!((number("difference")? - difference).abs() < 1e-9, "{row}");
        } else {
            let [ratio] = row["result"]["ratios"].as_array().context("ratios")?.as_slice() else {
                anyhow::bail!("{row}");
            };
            let expected = number("two")? / number("one")?;
            ensure!(
                (ratio.as_f64().context("a ratio")? - expected).abs() < 1e-9,
                "{row}"
            );
        }
    }
    // Nothing is measured twice.
    let again = jobs(scratch.path(), &bin, &["scaling-*"])?.expect(0)?;
    ensure!(
        again.stderr.matches("measured already").count() == 2,
        "{}",
        again.stderr
    );
    Ok(())
}

#[test]
fn what_is_missing_is_one_line() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let bin = binary("arcface-worker")?.parent().context("a folder")?.to_owned();
    for (bin, row, why) in [
        (bin.as_path(), "speed", "there is no row speed"),
        (scratch.path(), "accuracy-1", "there is no program"),
    ] {
        let refused = jobs(scratch.path(), bin, &[row])?.expect(2)?;
        ensure!(
            refused.stderr.contains(why) && refused.stderr.lines().count() == 1,
            "{}",
            refused.stderr
        );
    }
    Ok(())
}
