//! Sets that a job refuses as a whole, and what is there already.

use super::*;

/// A set that a job refuses as a whole is no good set for any tool.
#[test]
fn a_set_that_a_job_refuses_fails_every_check() {
    let scratch = tempfile::tempdir().unwrap();
    let (good, bad) = (scratch.path().join("good"), scratch.path().join("bad"));
    let out = scratch.path().join("out");
    synth(&good);
    let again = [
        "synth",
        "--identities",
        "1",
        "--images-per-identity",
        "1",
        "-o",
        text(&good),
    ];
    let (message, code) = tool(&again).unwrap_err();
    assert!(
        message.contains("train.rec is there already") && code == ExitCode::Usage,
        "{message}"
    );
    let rec = fs::read(good.join("train.rec")).unwrap();
    let idx = fs::read_to_string(good.join("train.idx")).unwrap();
    let beyond = format!("{idx}99\t18446744073709551615\n");
    for (what, rec, idx) in [
        ("an empty index", &rec[..], ""),
        (
            "records of identities cut off",
            &rec[..rec.len() - 40],
            idx.as_str(),
        ),
        ("an offset beyond the end", &rec[..], beyond.as_str()),
    ] {
        fs::create_dir_all(&bad).unwrap();
        fs::write(bad.join("train.rec"), rec).unwrap();
        fs::write(bad.join("train.idx"), idx).unwrap();
        let refused = data::open(&spec(&bad, None), None, 1, &[]).is_err();
        assert!(refused, "{what}: a job refuses it");
        let merge = ["merge", text(&good), text(&bad), "-o", text(&out)];
        for command in [&["verify", text(&bad)][..], &merge] {
            let (message, code) = tool(command).expect_err(what);
            assert_eq!(code, ExitCode::Failed, "{what}: {message}");
            assert!(message.contains("train."), "{what}: {message}");
        }
        assert!(!out.exists(), "{what}: nothing is written");
    }
    // Nobody writes into the pipe: opening it would wait for ever.
    fs::remove_file(bad.join("train.rec")).unwrap();
    nix::unistd::mkfifo(&bad.join("train.rec"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let (message, _) = tool(&["inspect", text(&bad.join("train.rec"))]).unwrap_err();
    assert!(message.contains("not a regular file"), "{message}");
}
