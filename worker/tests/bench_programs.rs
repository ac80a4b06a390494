//! The programs in `bench/`, with tiny sizes and a stand-in for the reference: what they write follows from the times,
//! what was measured stays, and what is missing is one line.
//!
//! Needs the Python packages of `scripts/setup.sh python` for the reference's side; says so where they are missing.

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

const WORKER: &str = env!("CARGO_BIN_EXE_arcface-worker");
/// `scripts/python.sh` ends with this if the packages are not there (EX_UNAVAILABLE).
const NO_PACKAGES: i32 = 69;
/// What is missing.
const UNUSABLE: i32 = 2;
/// After Ctrl-C.
const STOPPED: i32 = 130;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// `bench/compare_reference.py` with tiny sizes beside the stand-in.
fn compare(arguments: &str) -> Command {
    let mut command = Command::new(root().join("scripts/python.sh"));
    command
        .arg(root().join("bench/compare_reference.py"))
        .arg("--reference")
        .arg(root().join("tests/python/reference_stand_in"))
        .args(["--worker", WORKER])
        .args("--classes 400 --dim 24 --batch 6 --network tiny --threads 1 --steps 1".split(' '))
        .args(arguments.split(' '));
    command
}

/// The same to its end; nothing where there is no PyTorch, which must be there with `CI` set.
fn compared(command: &mut Command) -> Result<Option<Output>> {
    let output = command.output().context("start scripts/python.sh")?;
    let stderr = said(&output);
    if output.status.code() == Some(NO_PACKAGES) || stderr.contains("PyTorch is missing") {
        if std::env::var_os("CI").is_some() {
            bail!("the Python packages are missing: {stderr}");
        }
        eprintln!(
            "SKIPPED: the reference's side was not measured: {}",
            stderr.trim()
        );
        return Ok(None);
    }
    Ok(Some(output))
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(path: &Path) -> Result<Value> {
    let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    Ok(serde_json::from_slice(&text)?)
}

fn numbers(value: &Value) -> Result<Vec<f64>> {
    let list = value.as_array().with_context(|| format!("{value} is no list"))?;
    list.iter()
        .map(|number| number.as_f64().with_context(|| format!("{number} is no number")))
        .collect()
}

fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value[key].as_str().with_context(|| format!("{key}: {value}"))
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0
}

fn is_near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * b.abs()
}

/// Holds a row's medians and ratios against its times; gives what is compared with what.
fn check_row(name: &str, row: &Value) -> Result<Vec<String>> {
    let pairs = row["pairs"].as_u64().with_context(|| format!("{name}: {row}"))?;
    for key in ["date", "reference", "part"] {
        text(row, key)?;
    }
    for key in ["version", "commit", "sha256"] {
        text(&row["worker"], key)?;
    }
    let mut times = BTreeMap::new();
    for side in row["sides"].as_array().context("sides")? {
        let ms = numbers(&side["ms"])?;
        ensure!(ms.len() as u64 == pairs, "{name}: {side}");
        ensure!(ms.iter().all(|time| *time > 0.0), "{name}: {side}");
        let middle = side["median_ms"].as_f64().context("median_ms")?;
        ensure!(is_near(middle, median(&ms)), "{name}: {side}");
        let least = side["min_ms"].as_f64().context("min_ms")?;
        ensure!(least > 0.0 && least <= middle, "{name}: {side}");
        // Tiny work may take no memory that the allocator did not have.
        ensure!(
            side["peak_bytes"].is_u64() || side["peak_bytes"].is_null(),
            "{name}: {side}"
        );
        let of = format!("{}/{}", text(side, "side")?, text(side, "malloc")?);
        ensure!(times.insert(of.clone(), ms).is_none(), "{name}: {of} twice");
    }
    let mut compared = Vec::new();
    for entry in row["ratios"].as_array().context("ratios")? {
        let over = format!("{}/{}", text(entry, "over")?, text(entry, "over_malloc")?);
        let under = format!("{}/{}", text(entry, "under")?, text(entry, "under_malloc")?);
        let find = |side: &str| {
            times
                .get(side)
                .with_context(|| format!("{name}: nothing of {side}"))
        };
        let expected: Vec<f64> = find(&over)?
            .iter()
            .zip(find(&under)?)
            .map(|(a, b)| a / b)
            .collect();
        let given = numbers(&entry["ratios"])?;
        ensure!(
            given.len() == expected.len() && given.iter().zip(&expected).all(|(a, b)| is_near(*a, *b)),
            "{name}: {entry}, not {expected:?}"
        );
        let ratio = entry["ratio"].as_f64().context("ratio")?;
        ensure!(is_near(ratio, median(&expected)), "{name}: {entry}");
        compared.push(format!("{over} : {under}"));
    }
    Ok(compared)
}

#[test]
fn ratios_follow_from_the_times_of_both_sides() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("out.json");
    let heads = format!("head-100k-0.1 --pairs 2 --bf16 yes --output {}", path.display());
    let Some(output) = compared(&mut compare(&heads))? else {
        return Ok(());
    };
    ensure!(output.status.success(), "{}", said(&output));
    ensure!(
        said(&output).contains("head-100k-0.1: pair 2 of 2: "),
        "{}",
        said(&output)
    );

    let result = json(&path)?;
    ensure!(result["machine"]["cores"].as_u64() > Some(0), "{result}");
    ensure!(
        result["machine"]["processor"].is_string() && result["machine"]["features"].is_array(),
        "{result}"
    );
    let head = &result["rows"]["head-100k-0.1"];
    ensure!(
        head["sizes"] == serde_json::json!({"classes": 400, "dim": 24, "batch": 6, "rate": 0.1}),
        "{head}"
    );
    let mut seen = check_row("head-100k-0.1", head)?;
    seen.sort();
    ensure!(
        seen == [
            "plain/default : reference/default",
            "plain/tuned : reference/tuned",
            "reference/default : ours_bf16/default",
            "reference/default : ours_bf16/tuned",
            "reference/default : ours_fp32/default",
            "reference/default : ours_fp32/tuned",
            "reference/tuned : ours_bf16/tuned",
            "reference/tuned : ours_fp32/tuned",
        ],
        "{seen:?}"
    );
    // What is printed is what is written beside the results, with the ratio that they have.
    let table = fs::read_to_string(path.with_extension("md"))?;
    ensure!(String::from_utf8_lossy(&output.stdout) == table, "{table}");
    let ratio = head["ratios"][0]["ratio"].as_f64().context("ratio")?;
    ensure!(
        table.contains(&format!(" {ratio:.2} |")) && table.contains("`head-100k-0.1`"),
        "{table}"
    );

    // Other settings are another measurement; other rows join those that are there.
    let before = head.clone();
    let more = format!(
        "train-r18 infer-r50 step-r18 head-100k-0.1 --pairs 1 --malloc default --no-plain --bf16 yes --output {}",
        path.display()
    );
    let output = compare(&more).output()?;
    ensure!(output.status.success(), "{}", said(&output));
    let result = json(&path)?;
    for name in ["train-r18", "infer-r50", "step-r18"] {
        let expected = [
            "reference/default : ours_fp32/default",
            "reference/default : ours_bf16/default",
        ];
        ensure!(check_row(name, &result["rows"][name])? == expected, "{name}");
    }
    ensure!(result["rows"]["head-100k-0.1"] != before, "{before}");
    // What is there is not measured again.
    let output = compare(&more).output()?;
    ensure!(output.status.success(), "{}", said(&output));
    ensure!(
        said(&output).matches("measured already").count() == 4,
        "{}",
        said(&output)
    );
    ensure!(json(&path)? == result, "rows have changed");
    Ok(())
}

#[test]
fn what_was_measured_stays_when_it_is_stopped() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("out.json");
    let endless = format!(
        "head-100k --pairs 100000 --malloc default --no-plain --bf16 no --output {}",
        path.display()
    );
    let mut child = compare(&endless)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let mut stderr = BufReader::new(child.stderr.take().context("stderr")?);
    let mut lines = String::new();
    // Ends with the program, at the latest.
    while !lines.contains("pair 2 of 100000") && stderr.read_line(&mut lines)? > 0 {}
    if lines.contains("pair 2 of 100000") {
        kill(pid, Signal::SIGINT)?;
    }
    stderr.read_to_string(&mut lines)?;
    let code = child.wait()?.code();
    if code == Some(NO_PACKAGES) || lines.contains("PyTorch is missing") {
        ensure!(
            std::env::var_os("CI").is_none(),
            "the Python packages are missing: {lines}"
        );
        eprintln!("SKIPPED: the reference's side was not measured: {}", lines.trim());
        return Ok(());
    }
    ensure!(code == Some(STOPPED), "{code:?}: {lines}");
    let row = &json(&path)?["rows"]["head-100k"];
    ensure!(row["pairs"].as_u64() >= Some(2), "{row}");
    ensure!(
        check_row("head-100k", row)? == ["reference/default : ours_fp32/default"],
        "{row}"
    );
    Ok(())
}

#[test]
fn what_is_missing_is_one_line() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let empty = folder.path().to_str().context("path")?;
    let stand_in = root().join("tests/python/reference_stand_in");
    let stand_in = stand_in.to_str().context("path")?;
    let nowhere = folder.path().join("nowhere");
    let nowhere = nowhere.to_str().context("path")?;
    for (arguments, what) in [
        (vec!["--worker", WORKER], "--reference DIR is missing"),
        (
            vec!["--worker", WORKER, "--reference", empty],
            "it has no partial_fc_v2.py",
        ),
        (
            vec!["--worker", nowhere, "--reference", stand_in],
            "there is no program",
        ),
        (
            vec!["--worker", "/bin/true", "--reference", stand_in],
            "is not an arcface-worker",
        ),
        (
            vec!["--worker", WORKER, "--reference", stand_in, "head-7"],
            "there is no row head-7",
        ),
        // Without the packages.
        (
            vec!["--worker", WORKER, "--reference", stand_in],
            "PyTorch is missing",
        ),
    ] {
        let output = Command::new("python3")
            .arg("-sSB")
            .arg(root().join("bench/compare_reference.py"))
            .args(&arguments)
            .env_remove("PYTHONPATH")
            .output()?;
        let stderr = said(&output);
        ensure!(output.status.code() == Some(UNUSABLE), "{arguments:?}: {stderr}");
        ensure!(
            stderr.lines().count() == 1 && stderr.contains(what),
            "{what}: {stderr}"
        );
        ensure!(output.stdout.is_empty());
    }
    Ok(())
}

/// `make bench` with tiny sizes.
fn quick(output: &Path, arguments: &[&str]) -> Result<Output> {
    Command::new(root().join("scripts/bench.sh"))
        .arg("--output")
        .arg(output)
        .args(arguments)
        .env("BENCH_QUICK", "1")
        .env("ARCFACE_WORKER", WORKER)
        .output()
        .context("start scripts/bench.sh")
}

#[test]
fn every_row_of_make_bench_runs_and_is_in_the_table() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("training.json");
    let output = quick(&path, &[])?;
    ensure!(output.status.success(), "{}", said(&output));
    let result = json(&path)?;
    let table = fs::read_to_string(path.with_extension("md"))?;
    ensure!(table.contains("say nothing about speed"), "{table}");
    let rows = result["rows"].as_object().context("rows")?;
    let parts = [
        "head",
        "step",
        "backbone",
        "loader",
        "collective",
        "checkpoint",
        "ijb",
    ];
    for part in parts {
        ensure!(
            rows.values().any(|row| row["result"]["bench"] == part),
            "nothing of {part}"
        );
    }
    for (name, row) in rows {
        ensure!(row["quick"] == true && row["date"].is_string(), "{name}: {row}");
        let command = text(row, "command")?;
        ensure!(table.contains(command), "{name}: {command} is not in {table}");
        let result = &row["result"];
        if command.contains("--against plain") {
            let ratios = numbers(&result["ratios"])?;
            let ratio = result["ratio"].as_f64().context("ratio")?;
            ensure!(is_near(ratio, median(&ratios)), "{name}: {result}");
            ensure!(table.contains(&format!(" {ratio:.2} |")), "{name}: {table}");
        }
    }

    // Nothing is measured twice, unless somebody says so.
    let output = quick(&path, &[])?;
    ensure!(output.status.success(), "{}", said(&output));
    ensure!(
        said(&output).matches("measured already").count() == rows.len(),
        "{}",
        said(&output)
    );
    ensure!(json(&path)? == result, "rows have changed");
    let output = quick(&path, &["--again", "loader-drawn"])?;
    ensure!(output.status.success(), "{}", said(&output));
    let again = json(&path)?;
    for (name, row) in rows {
        ensure!(
            (again["rows"][name] == *row) == (name != "loader-drawn"),
            "{name}"
        );
    }

    let output = quick(&path, &["nosuch"])?;
    ensure!(output.status.code() == Some(UNUSABLE), "{}", said(&output));
    ensure!(said(&output).lines().count() == 1, "{}", said(&output));
    Ok(())
}

/// Its files are gigabytes at the default sizes, and a stopped run left them behind.
#[test]
fn a_benchmark_that_is_stopped_leaves_no_files() -> Result<()> {
    // What this process ignores its children would. A job in a script's background is not to hear of Ctrl-C.
    for (given, ignored, signal) in [
        ("--default-signal=INT,TERM", None, Signal::SIGTERM),
        ("--default-signal=INT,TERM", None, Signal::SIGINT),
        ("--ignore-signal=INT", Some(Signal::SIGINT), Signal::SIGTERM),
    ] {
        let scratch = tempfile::tempdir()?;
        let mut bench = Command::new("env")
            .args([given, WORKER])
            .args("bench ijb --images 400000 --templates 20000 --dim 512 --dir".split(' '))
            .arg(scratch.path())
            .stdout(Stdio::null())
            .spawn()?;
        let written = || -> Result<bool> {
            let folder = fs::read_dir(scratch.path())?.next().transpose()?;
            Ok(folder.is_some_and(|folder| folder.path().join("IJBC/meta").is_dir()))
        };
        while !written()? {
            ensure!(bench.try_wait()?.is_none(), "it ended by itself");
            std::thread::yield_now();
        }
        let pid = Pid::from_raw(bench.id().try_into()?);
        if let Some(ignored) = ignored {
            kill(pid, ignored)?;
        }
        kill(pid, signal)?;
        let status = bench.wait()?;
        ensure!(
            status.signal() == Some(signal as i32),
            "{given}, {signal}: {status}"
        );
        ensure!(
            fs::read_dir(scratch.path())?.next().is_none(),
            "{signal}: files stay"
        );
    }
    Ok(())
}

#[test]
fn the_default_allocator_is_the_same_everywhere() -> Result<()> {
    let python = fs::read_to_string(root().join("bench/compare_reference.py"))?;
    let ours = include_str!("../src/tools/bench/comparison.rs");
    let (_, after) = ours.split_once("const DEFAULT").context("the worker's setting")?;
    let (pair, _) = after.split_once(");").context("its end")?;
    let texts: Vec<&str> = pair.split('"').skip(1).step_by(2).collect();
    let [name, value] = texts[..] else {
        anyhow::bail!("a name and a value: {texts:?}");
    };
    ensure!(
        python.contains(&format!("{name:?}: {value:?}")),
        "{name} is not {value}"
    );
    // Every part of it undoes what the program is built with.
    let built = include_str!("../src/allocator.rs");
    for setting in value.split(',') {
        let (key, changed) = setting.split_once(':').context("key:value")?;
        ensure!(
            built.contains(&format!("{key}:")),
            "{key} is not set in the program"
        );
        ensure!(
            !built.contains(&format!("{setting},")) && !built.contains(&format!("{setting}\\0")),
            "{key} is {changed} in the program too"
        );
    }
    Ok(())
}
