//! Files that go from one rank to another beside the ring: parts of checkpoints, into the memory of another node and back.
//! A server gives and takes files below one directory; a caller of another job or generation is refused. Knows sockets
//! and files; knows no tensor, and not what is in the files.
//!
//! A connection carries one file. It begins with a magic number, the session's digest, what is wanted and the file's name;
//! the answer is a status byte, with a line of text if that is not 0. A file is its length (8 bytes, little endian), its
//! bytes, and their BLAKE3 digest. What does not have its digest is never given its name.

use super::Session;
use std::{
    fs::{self, File},
    io::{self, BufReader, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    path::{Component, Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

const MAGIC: &[u8; 8] = b"AFPARTS1";
/// Connections that are served at once; more are turned away.
const MAX_SERVED: usize = 64;
/// Longest name.
const MAX_NAME: usize = 255;
/// Longest line of an answer.
const MAX_TEXT: usize = 1000;
/// For a connection to be made.
const CONNECT: Duration = Duration::from_secs(5);
/// For the next byte of the other side.
const SILENCE: Duration = Duration::from_secs(30);
const CHUNK: usize = 1 << 20;

const PUT: u8 = 1;
const GET: u8 = 2;

/// Gives and takes files below a directory, until it is dropped.
pub struct PartsServer {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl PartsServer {
    /// Serves `directory` at a free port of `host`, to callers of this session. Files are named `folder/file`, relative to
    /// the directory; folders are made as files come.
    ///
    /// # Errors
    /// What the system says.
    pub fn start(host: &str, session: &Session, directory: PathBuf) -> io::Result<Self> {
        let listener = TcpListener::bind((host, 0))?;
        let address = listener.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let (digest, stopped) = (session.digest(), stop.clone());
        let thread = std::thread::Builder::new()
            .name("parts".into())
            .spawn(move || accept(&listener, digest, &directory, &stopped))?;
        Ok(Self {
            address,
            stop,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.address.port()
    }
}

impl Drop for PartsServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread; where even that fails, it ends with the process. An address that stands for all is reached on
        // loopback.
        let woken = TcpStream::connect(self.address).is_ok();
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            thread.join().unwrap_or_default();
        }
    }
}

fn accept(listener: &TcpListener, session: [u8; 32], directory: &Path, stop: &AtomicBool) {
    let served = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let Ok(stream) = stream else { continue };
        if served.load(Ordering::SeqCst) >= MAX_SERVED {
            continue;
        }
        served.fetch_add(1, Ordering::SeqCst);
        let (directory, count) = (directory.to_owned(), served.clone());
        let serving = std::thread::Builder::new().spawn(move || {
            // The caller sees its end of it.
            drop(serve(stream, session, &directory));
            count.fetch_sub(1, Ordering::SeqCst);
        });
        if serving.is_err() {
            served.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

fn serve(mut stream: TcpStream, session: [u8; 32], directory: &Path) -> io::Result<()> {
    prepare(&stream)?;
    let mut start = [0; 8 + 32 + 1 + 2];
    stream.read_exact(&mut start)?;
    if &start[..8] != MAGIC {
        return Ok(()); // None of ours: it gets no answer.
    }
    let mut name = vec![0; usize::from(u16::from_le_bytes([start[41], start[42]]))];
    if name.len() > MAX_NAME {
        return answer(&mut stream, Err("the name is too long".into()));
    }
    stream.read_exact(&mut name)?;
    if start[8..40] != session {
        return answer(
            &mut stream,
            Err("another job or generation is served here".into()),
        );
    }
    let path = match below(directory, &String::from_utf8_lossy(&name)) {
        Ok(path) => path,
        Err(refused) => return answer(&mut stream, Err(refused)),
    };
    match start[40] {
        PUT => {
            let taken = receive(&mut stream, &path).map_err(|error| error.to_string());
            answer(&mut stream, taken.map(drop))
        }
        GET => match File::open(&path) {
            Ok(file) => {
                answer(&mut stream, Ok(()))?;
                send(&mut stream, file)
            }
            Err(error) => answer(&mut stream, Err(error.to_string())),
        },
        other => answer(&mut stream, Err(format!("{other} is nothing that can be wanted"))),
    }
}

/// A path of one folder and one file.
fn below(directory: &Path, name: &str) -> Result<PathBuf, String> {
    let parts: Vec<Component<'_>> = Path::new(name).components().collect();
    let plain = parts.iter().all(|part| matches!(part, Component::Normal(_)));
    match plain && parts.len() == 2 {
        true => Ok(directory.join(name)),
        false => Err(format!("{name:?} is not folder/file")),
    }
}

fn answer(stream: &mut TcpStream, result: Result<(), String>) -> io::Result<()> {
    let text = match &result {
        Ok(()) => return stream.write_all(&[0]),
        Err(text) => text.as_bytes(),
    };
    let text = &text[..text.len().min(MAX_TEXT)];
    let mut message = vec![1];
    message.extend((text.len() as u16).to_le_bytes());
    message.extend(text);
    stream.write_all(&message)?;
    // What the other side is still sending would turn the end of the connection into a reset that overtakes the answer.
    stream.shutdown(Shutdown::Write)?;
    io::copy(&mut stream.take(u64::MAX), &mut io::sink()).map(drop)
}

fn answered(stream: &mut TcpStream) -> io::Result<()> {
    let mut status = [0; 1];
    stream.read_exact(&mut status)?;
    if status[0] == 0 {
        return Ok(());
    }
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut text = vec![0; usize::from(u16::from_le_bytes(length)).min(MAX_TEXT)];
    stream.read_exact(&mut text)?;
    Err(io::Error::other(String::from_utf8_lossy(&text).into_owned()))
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))
}

fn call(endpoint: &str, session: &Session, wanted: u8, name: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(ErrorKind::NotFound, format!("{endpoint} is no address"));
    for address in endpoint.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT) {
            Ok(mut stream) => {
                prepare(&stream)?;
                let mut start = MAGIC.to_vec();
                start.extend(session.digest());
                start.push(wanted);
                start.extend((name.len() as u16).to_le_bytes());
                start.extend(name.as_bytes());
                stream.write_all(&start)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Puts a copy of the file at `path` into the folder that `endpoint` serves. When this returns it is there.
///
/// # Errors
/// What either system says, or why the other side refuses.
pub fn put(endpoint: &str, session: &Session, name: &str, path: &Path) -> io::Result<()> {
    let mut stream = call(endpoint, session, PUT, name)?;
    let sent = send(&mut stream, File::open(path)?);
    // The reason of a refusal says more than that nobody read on.
    answered(&mut stream).and(sent)
}

/// Gets the file that `endpoint` serves under `name`, to `path`, whose directory must be there.
///
/// # Errors
/// What either system says, or why the other side refuses.
pub fn get(endpoint: &str, session: &Session, name: &str, path: &Path) -> io::Result<()> {
    let mut stream = call(endpoint, session, GET, name)?;
    answered(&mut stream)?;
    receive(&mut stream, path)
}

fn send(stream: &mut TcpStream, file: File) -> io::Result<()> {
    let bytes = file.metadata()?.len();
    stream.write_all(&bytes.to_le_bytes())?;
    let mut reader = file.take(bytes);
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let count = reader.read(&mut buffer)?;
        if count == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        hasher.update(&buffer[..count]);
        stream.write_all(&buffer[..count])?;
        left -= count as u64;
    }
    stream.write_all(hasher.finalize().as_bytes())
}

/// Takes a file and gives it its name once it is whole.
fn receive(stream: &mut TcpStream, path: &Path) -> io::Result<()> {
    static UNIQUE: AtomicUsize = AtomicUsize::new(0);
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let unique = UNIQUE.fetch_add(1, Ordering::Relaxed);
    let temporary = folder.join(format!(".{}-{unique}.tmp", std::process::id()));
    let result = fill(stream, &temporary).and_then(|()| fs::rename(&temporary, path));
    if result.is_err() {
        // The first error says more.
        drop(fs::remove_file(&temporary));
    }
    result
}

fn fill(stream: &mut TcpStream, path: &Path) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(CHUNK, stream);
    let mut length = [0; 8];
    reader.read_exact(&mut length)?;
    let mut left = u64::from_le_bytes(length);
    let mut file = File::create(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; CHUNK];
    while left > 0 {
        let wanted = (CHUNK as u64).min(left) as usize;
        let count = reader.read(&mut buffer[..wanted])?;
        if count == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        hasher.update(&buffer[..count]);
        file.write_all(&buffer[..count])?;
        left -= count as u64;
    }
    let mut digest = [0; 32];
    reader.read_exact(&mut digest)?;
    match hasher.finalize() == digest {
        true => Ok(()),
        false => Err(io::Error::new(
            ErrorKind::InvalidData,
            "the bytes that came are not those that were sent",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(generation: u64) -> Session {
        Session {
            job: "job-000000000001".into(),
            generation,
        }
    }

    struct Setup {
        scratch: tempfile::TempDir,
        endpoint: String,
        _server: PartsServer,
    }

    fn setup() -> Setup {
        let scratch = tempfile::tempdir().expect("scratch");
        let served = scratch.path().join("served");
        let server = PartsServer::start("127.0.0.1", &session(1), served).expect("start");
        Setup {
            endpoint: format!("127.0.0.1:{}", server.port()),
            scratch,
            _server: server,
        }
    }

    impl Setup {
        fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
            let path = self.scratch.path().join(name);
            fs::write(&path, bytes).expect("write");
            path
        }

        fn served(&self) -> Vec<String> {
            let walk = |path: PathBuf| fs::read_dir(path).into_iter().flatten().flatten();
            let folders = walk(self.scratch.path().join("served"));
            let mut names: Vec<String> = folders
                .flat_map(|folder| walk(folder.path()))
                .map(|file| file.file_name().to_string_lossy().into_owned())
                .collect();
            names.sort();
            names
        }
    }

    #[test]
    fn a_file_goes_there_and_comes_back() {
        let setup = setup();
        for size in [0, 1, CHUNK, CHUNK * 2 + 3] {
            let bytes: Vec<u8> = (0..size).map(|k| (k * 7 % 251) as u8).collect();
            let from = setup.file("from", &bytes);
            put(&setup.endpoint, &session(1), "step-1/part", &from).expect("put");
            let back = setup.scratch.path().join("back");
            get(&setup.endpoint, &session(1), "step-1/part", &back).expect("get");
            assert!(fs::read(&back).expect("read") == bytes, "{size} bytes");
        }
        assert_eq!(setup.served(), ["part"]);
    }

    #[test]
    fn strangers_and_other_paths_are_refused_with_a_reason() {
        let setup = setup();
        let from = setup.file("from", &[1; 100_000]);
        let put_to = |session: &Session, name: &str| put(&setup.endpoint, session, name, &from);
        let stale = put_to(&session(2), "step-1/part").expect_err("another generation");
        assert!(stale.to_string().contains("another job or generation"), "{stale}");
        for name in ["../part", "part", "/etc/part", "a/b/c", "step-1/..", ""] {
            let refused = put_to(&session(1), name).expect_err(name);
            assert!(
                refused.to_string().contains("is not folder/file"),
                "{name}: {refused}"
            );
        }
        let missing = get(
            &setup.endpoint,
            &session(1),
            "step-1/part",
            &setup.scratch.path().join("to"),
        );
        let missing = missing.expect_err("missing").to_string();
        assert!(missing.contains("No such file"), "{missing}");
        assert_eq!(setup.served(), Vec::<String>::new());
        assert!(!setup.scratch.path().join("part").exists());
    }

    #[test]
    fn what_is_cut_or_changed_on_the_way_leaves_nothing() {
        let setup = setup();
        let mut good = 5u64.to_le_bytes().to_vec();
        good.extend(b"bytes");
        good.extend(blake3::hash(b"bytes").as_bytes());
        for cut in 0..good.len() {
            let mut stream = call(&setup.endpoint, &session(1), PUT, "step-1/part").expect("call");
            stream.write_all(&good[..cut]).expect("write");
            stream.shutdown(Shutdown::Write).expect("shutdown");
            assert!(answered(&mut stream).is_err(), "cut after {cut} bytes");
        }
        for flipped in 8..good.len() {
            let mut bad = good.clone();
            bad[flipped] ^= 1;
            let mut stream = call(&setup.endpoint, &session(1), PUT, "step-1/part").expect("call");
            stream.write_all(&bad).expect("write");
            let refused = answered(&mut stream).expect_err("changed").to_string();
            assert!(refused.contains("not those that were sent"), "{refused}");
        }
        assert_eq!(setup.served(), Vec::<String>::new());
        let mut stream = call(&setup.endpoint, &session(1), PUT, "step-1/part").expect("call");
        stream.write_all(&good).expect("write");
        answered(&mut stream).expect("taken");
        assert_eq!(setup.served(), ["part"]);
    }

    #[test]
    fn a_full_memory_is_named_and_a_server_that_is_gone_too() {
        let Setup {
            scratch,
            endpoint,
            _server,
        } = setup();
        let from = scratch.path().join("from");
        fs::write(&from, [0; 10]).expect("write");
        // A file in the folder's place: as good as a disk that takes nothing more.
        fs::write(scratch.path().join("served"), []).expect("write");
        let refused = put(&endpoint, &session(1), "step-1/part", &from).expect_err("no folder");
        assert!(refused.to_string().contains("Not a directory"), "{refused}");
        drop(_server);
        let gone = put(&endpoint, &session(1), "step-1/part", &from).expect_err("gone");
        assert_eq!(gone.kind(), ErrorKind::ConnectionRefused, "{gone}");
    }
}
