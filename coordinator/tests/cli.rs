//! The command line as a person or a script meets it: the built binary, its exit codes, and one clear line for each
//! thing that is wrong.

use std::fs::Permissions;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

const SMALLEST: &str = "output = \"o/x\"\n[model]\nnetwork = \"r18\"\n[data]\nrec = \"/d\"\n";

fn arcface(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_arcface-coordinator"));
    for name in [
        "ARCFACE_COORDINATOR",
        "ARCFACE_STORE",
        "ARCFACE_LOG",
        "ARCFACE_WORKER",
    ] {
        command.env_remove(name);
    }
    command.args(arguments).stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> (i32, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = arcface(arguments).output().expect("start the binary");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (status.code().expect("not killed"), text(stdout), text(stderr))
}

/// A port that nobody listens on: it was just given back.
fn closed_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    listener.local_addr().expect("address").to_string()
}

fn job_file(folder: &Path, text: &str) -> String {
    let path = folder.join("job.toml");
    std::fs::write(&path, text).expect("write job file");
    path.to_str().expect("UTF-8").to_owned()
}

#[test]
fn an_unreachable_coordinator_is_one_line_and_4() {
    let address = closed_port();
    let commands: [&[&str]; 8] = [
        &["jobs"],
        &["job", "job-0"],
        &["watch", "job-0"],
        &["cancel", "job-0"],
        &["nodes"],
        &["drain", "node-1"],
        &["checkpoints", "job-0"],
        &["evals", "job-0"],
    ];
    for command in commands {
        let (code, stdout, stderr) = run(&[command, &["--coordinator", &address]].concat());
        let mut lines = stderr.lines();
        assert_eq!(
            lines.next(),
            Some(format!("error: cannot reach the coordinator at {address}: connection refused").as_str())
        );
        assert!(
            lines.next().is_some_and(|line| line.starts_with("hint: ")),
            "{stderr}"
        );
        assert_eq!(
            (code, stdout.as_str(), lines.next()),
            (4, "", None),
            "{command:?}"
        );
    }
}

#[test]
fn every_bad_field_of_a_job_file_has_its_line_and_2() {
    let folder = TempDir::new().expect("scratch");
    let file = job_file(
        folder.path(),
        "output = \"o/x\"\n[model]\nnetwork = \"r5O\"\n[data]\nrec = \"/d\"\n[head]\nsample_rate = 1.5\nscal = 3\n",
    );
    // No coordinator is needed to see that a file is wrong.
    for command in ["submit", "run"] {
        let (code, stdout, stderr) = run(&[command, &file, "--set", "train.lr=fast"]);
        assert_eq!((code, stdout.as_str()), (2, ""));
        let expected = [
            "model.network: \"r5O\" is not one of tiny, r18, r34, r50, r100, r200, r2060, mbf, mbf_large, vit_t, vit_t_dp005_mask0, vit_s, vit_s_dp005_mask_0, vit_b, vit_b_dp005_mask_005, vit_l_dp005_mask_005, vit_h",
            "hint: did you mean \"r50\"?",
            "head.scal: unknown key",
            "hint: did you mean \"scale\"?",
            "head.sample_rate: 1.5 is not in (0, 1]",
            "hint: 0.1 is the usual value",
            "train.lr: \"fast\" is not a number",
        ];
        let expected: Vec<_> = expected
            .iter()
            .map(|line| match line.starts_with("hint") {
                true => (*line).to_owned(),
                false => format!("error: job {file}: {line}"),
            })
            .collect();
        assert_eq!(stderr.lines().collect::<Vec<_>>(), expected);
    }
}

#[test]
fn a_missing_job_file_is_3_and_one_that_is_no_file_2() {
    let folder = TempDir::new().expect("scratch");
    let missing = folder.path().join("none.toml").display().to_string();
    let (code, _, stderr) = run(&["submit", &missing]);
    assert_eq!(code, 3);
    assert!(
        stderr.starts_with(&format!("error: job {missing}: no such file\nhint: ")),
        "{stderr}"
    );

    let (code, _, stderr) = run(&["submit", &folder.path().display().to_string()]);
    assert_eq!((code, stderr.contains("is a directory")), (2, true), "{stderr}");

    let (code, _, stderr) = run(&["submit", "/dev/zero"]);
    assert_eq!(
        (code, stderr.contains("is larger than 1.0 MiB")),
        (2, true),
        "{stderr}"
    );
}

#[test]
fn a_file_that_is_not_toml_names_line_and_column() {
    let folder = TempDir::new().expect("scratch");
    let file = job_file(folder.path(), "output = \"x\"\n[model\n");
    let (code, _, stderr) = run(&["submit", &file]);
    assert_eq!(code, 2);
    assert!(
        stderr.starts_with(&format!("error: job {file}: line 2, column ")),
        "{stderr}"
    );
}

#[test]
fn a_dry_run_prints_the_whole_job_which_is_a_job_file_again() {
    let folder = TempDir::new().expect("scratch");
    let file = job_file(folder.path(), SMALLEST);
    let (code, printed, stderr) = run(&["submit", &file, "--dry-run", "--set", "train.lr=0.2"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert!(
        printed.contains("lr = 0.2\n") && printed.contains("sample_rate = 1.0\n"),
        "{printed}"
    );
    let again = job_file(folder.path(), &printed);
    assert_eq!(run(&["submit", &again, "--dry-run"]).1, printed);
}

#[test]
fn wrong_usage_is_2() {
    let commands: [&[&str]; 7] = [
        &[],
        &["sumbit"],
        &["jobs", "--coordinator", "nowhere"],
        &["jobs", "--output", "yaml"],
        &["serve", "--listen", "localhost"],
        &["serve", "--store", "etcd:127.0.0.1:2379"],
        &["serve", "--store", "/tmp/x"],
    ];
    for command in commands {
        let (code, stdout, stderr) = run(command);
        assert_eq!((code, stdout.as_str()), (2, ""), "{command:?}");
        assert!(!stderr.is_empty(), "{command:?}");
    }
    let (_, _, stderr) = run(&["serve", "--store", "etcd:127.0.0.1:2379"]);
    assert!(stderr.contains("is not http[s]://HOST:PORT"), "{stderr}");
}

#[test]
fn an_etcd_that_is_not_there_is_one_line_a_hint_and_4() {
    let nobody = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = nobody.local_addr().expect("address").to_string();
    drop(nobody);
    let store = format!("etcd:http://{address}");
    let (code, _, stderr) = run(&[
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--metrics",
        "127.0.0.1:0",
        "--store",
        &store,
    ]);
    assert_eq!(code, 4, "{stderr}");
    let lines: Vec<_> = stderr.lines().filter(|line| !line.starts_with('{')).collect();
    assert_eq!(lines.len(), 2, "{stderr}");
    assert!(
        lines[0].contains(&address) && lines[0].contains("refused"),
        "{stderr}"
    );
    assert!(lines[1].starts_with("hint: "), "{stderr}");
}

#[test]
fn a_port_in_use_is_one_line_and_4() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = taken.local_addr().expect("address").to_string();
    let folder = TempDir::new().expect("scratch");
    let store = format!("embedded:{}", folder.path().display());
    let (code, stdout, stderr) = run(&[
        "serve",
        "--listen",
        &address,
        "--metrics",
        "127.0.0.1:0",
        "--store",
        &store,
        "--log-format",
        "text",
    ]);
    assert_eq!((code, stdout.as_str()), (4, ""), "{stderr}");
    let mut lines = stderr.lines().skip_while(|line| !line.starts_with("error: "));
    assert_eq!(
        lines.next(),
        Some(format!("error: listen on {address}: the port is in use").as_str())
    );
    assert!(
        lines.next().is_some_and(|line| line.starts_with("hint: ")),
        "{stderr}"
    );
}

#[test]
fn a_job_with_more_ranks_than_slots_is_refused_before_anything_starts() {
    let folder = TempDir::new().expect("scratch");
    let file = job_file(folder.path(), SMALLEST);
    let (code, _, stderr) = run(&[
        "run",
        &file,
        "--nodes",
        "1",
        "--slots",
        "2",
        "--set",
        "job.world_size=4",
    ]);
    assert_eq!(code, 2);
    assert_eq!(
        stderr,
        "error: the job wants 4 ranks, --nodes 1 --slots 2 has 2\nhint: --nodes 2, or --set job.world_size=2\n"
    );
}

#[test]
fn run_without_a_worker_says_where_it_looked() {
    let folder = TempDir::new().expect("scratch");
    let file = job_file(folder.path(), SMALLEST);
    let output = arcface(&["run", &file])
        .env("ARCFACE_WORKER", folder.path().join("none"))
        .current_dir(folder.path())
        .output()
        .expect("start");
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).contains("none: no such file\nhint: "));
}

#[test]
fn run_whose_workers_end_says_what_they_said_last_and_where_the_rest_is() {
    let folder = TempDir::new().expect("scratch");
    let file = job_file(folder.path(), SMALLEST);
    let worker = folder.path().join("worker");
    std::fs::write(
        &worker,
        "#!/bin/sh\necho first\necho \"cannot start with $*\" >&2\nexit 7\n",
    )
    .expect("write");
    std::fs::set_permissions(&worker, Permissions::from_mode(0o755)).expect("make it executable");
    let output = arcface(&["run", &file, "--nodes", "1", "--device", "cpu"])
        .env("ARCFACE_WORKER", &worker)
        .current_dir(folder.path())
        .output()
        .expect("start");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(1), &b""[..]),
        "{stderr}"
    );
    let said = "error: worker node-1 ended (exit status: 7): cannot start with --join 127.0.0.1:";
    assert!(stderr.contains(said), "{stderr}");
    assert!(
        stderr.contains("--slots 1 --node-id node-1 --parent-pid ")
            && stderr.contains(" --device cpu\nhint: its whole log is "),
        "{stderr}"
    );
    assert!(folder.path().join("o/x/run/metrics.prom").is_file(), "{stderr}");

    // The job of that run is not taken up by the next one, which has the same store.
    let again = arcface(&["run", &file, "--nodes", "1"])
        .env("ARCFACE_WORKER", &worker)
        .current_dir(folder.path())
        .output()
        .expect("start");
    assert_eq!(
        again.status.code(),
        Some(1),
        "{}",
        String::from_utf8_lossy(&again.stderr)
    );
}

#[test]
fn a_recipe_becomes_a_job_file_that_can_be_submitted() {
    let folder = TempDir::new().expect("scratch");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (recipe, job) = (path("faces_2gpus.py"), path("job.toml"));
    std::fs::write(
        &recipe,
        "config.rec = '/d'\nconfig.num_epoch = 3\nconfig.lr = 0.2\nconfig.dali = True\n",
    )
    .expect("write");

    let (code, printed, stderr) = run(&["convert-config", &recipe]);
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stderr.starts_with(&format!("warning: {recipe}:4: config.dali is not carried over: ")),
        "{stderr}"
    );
    assert_eq!(stderr.lines().count(), 1, "{stderr}");

    let (code, stdout, stderr) = run(&["convert-config", &recipe, "-o", &job]);
    assert_eq!((code, stdout.as_str()), (0, ""), "{stderr}");
    assert_eq!(std::fs::read_to_string(&job).expect("written"), printed);
    let (code, filled, stderr) = run(&["submit", &job, "--dry-run"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(
        filled.contains("world_size = 2\n") && filled.contains("lr = 0.2\n"),
        "{filled}"
    );

    // What is there is replaced only when told so, and never with half a file.
    let (code, _, stderr) = run(&["convert-config", &recipe, "-o", &job]);
    assert_eq!(
        (code, stderr),
        (
            2,
            format!("error: -o {job}: is there already\nhint: --force replaces it\n")
        )
    );
    std::fs::write(&job, "mine").expect("write");
    std::fs::write(
        &recipe,
        "config.rec = '/d'\nconfig.num_epoch = 3\nconfig.lr = 0\n",
    )
    .expect("write");
    let (code, _, stderr) = run(&["convert-config", &recipe, "-o", &job, "--force"]);
    assert_eq!(code, 2);
    assert!(
        stderr.starts_with(&format!(
            "error: recipe {recipe}:3: config.lr: 0 is not a positive number\nhint: "
        )),
        "{stderr}"
    );
    assert_eq!(std::fs::read_to_string(&job).expect("kept"), "mine");
    std::fs::write(&recipe, "config.rec = '/d'\nconfig.num_epoch = 3\n").expect("write");
    assert_eq!(
        run(&["convert-config", &recipe, "-o", &job, "--force", "--gpus", "4"]).0,
        0
    );
    assert!(
        std::fs::read_to_string(&job)
            .expect("replaced")
            .contains("world_size = 4\n")
    );
    assert_eq!(
        std::fs::read_dir(folder.path()).expect("folder").count(),
        2,
        "no draft is left"
    );

    assert_eq!(run(&["convert-config", &path("none.py")]).0, 3);
    assert_eq!(
        run(&["convert-config", &recipe, "-o", "/dev/null", "--force"]).0,
        2
    );
    assert_eq!(run(&["convert-config", &recipe, "--gpus", "0"]).0, 2);
}

#[test]
fn every_shell_has_completions_that_know_every_command() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let (code, script, stderr) = run(&["completions", shell]);
        assert_eq!((code, stderr.as_str()), (0, ""), "{shell}");
        for command in ["submit", "convert-config", "checkpoints"] {
            assert!(script.contains(command), "{shell} does not know {command}");
        }
    }
}

#[test]
fn a_reader_that_leaves_ends_the_command_quietly() {
    // Larger than a pipe's buffer, so that writing meets the closed end.
    let mut child = arcface(&["completions", "zsh"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start");
    let mut line = String::new();
    BufReader::with_capacity(16, child.stdout.take().expect("piped"))
        .read_line(&mut line)
        .expect("a line");
    let mut stderr = String::new();
    child
        .stderr
        .take()
        .expect("piped")
        .read_to_string(&mut stderr)
        .expect("read");
    let status = child.wait().expect("wait");
    assert_eq!((status.code(), stderr.as_str()), (Some(0), ""));
    assert!(line.starts_with("#compdef"));
}
