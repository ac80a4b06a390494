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

/// Landmarks of another picture gave black crops, and a photograph in another size half a face.
#[test]
fn a_face_outside_of_its_photograph_is_named_or_left_out() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    for (number, name) in (0u32..).zip(["photographs/ann/1.png", "photographs/bob/1.png"]) {
        picture(&at(name), number, 200);
    }
    let row = |image: &str, by: f64| {
        let points = data::align::TEMPLATE.map(|[x, y]| format!("{},{}", x + by, y + by));
        format!("{image},{}\n", points.join(","))
    };
    let (list, crops) = (at("photographs/faces.csv"), at("crops"));
    let align = ["align", "--landmarks", text(&list), "-o", text(&crops)];
    fs::write(&list, row("ann/1.png", 40.0) + &row("bob/1.png", 400.0)).unwrap();
    let (message, code) = tool(&align).unwrap_err();
    assert!(
        message
            .contains("bob/1.png: 5 of the face's 5 landmarks lie outside of the picture, which is 200x200")
            && message.contains("hint: landmarks are pixels")
            && code == ExitCode::Failed,
        "{message}"
    );
    assert!(!crops.exists());
    tool(&[&align[..], &["--skip-damaged"]].concat()).unwrap();
    assert!(crops.join("ann/1.jpg").is_file() && !crops.join("bob").exists());
}

#[test]
fn what_a_set_cannot_keep_is_named_before_it_is_packed() {
    let scratch = tempfile::tempdir().unwrap();
    let (faces, out) = (scratch.path().join("faces"), scratch.path().join("out"));
    picture(&faces.join("ann/1.jpg"), 0, 112);
    picture(&faces.join("bob/long.jpg"), 1, 112);
    let mut long = fs::read(faces.join("bob/long.jpg")).unwrap();
    long.resize(17 << 20, 0);
    fs::write(faces.join("bob/long.jpg"), long).unwrap();
    let pack = ["pack", text(&faces), "-o", text(&out)];
    let (message, code) = tool(&pack).unwrap_err();
    assert!(
        message.contains("bob/long.jpg: the file has 17825792 bytes, more than the 16777192 of a record")
            && message.contains("hint: --reencode 95")
            && code == ExitCode::Failed,
        "{message}"
    );
    assert!(!out.join("train.rec").exists());
    tool(&[&pack[..], &["--reencode", "95"]].concat()).unwrap();
    tool(&["verify", text(&out)]).unwrap();

    fs::rename(faces.join("bob"), faces.join("ann\tlee")).unwrap();
    let (message, code) = tool(&[&pack[..], &["--force"]].concat()).unwrap_err();
    assert!(
        message.contains("the name \"ann\\tlee\" of an identity has a tab or a line end in it")
            && message.contains("hint: rename the folder")
            && code == ExitCode::Failed,
        "{message}"
    );
    assert_eq!(names(&out), ["ann", "bob"], "the set before is as it was");
}
