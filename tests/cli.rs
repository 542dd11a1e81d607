//! The program as a shell sees it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Output};
use std::thread;

/// `polpo health` with no setting but where the server is.
fn health(bind: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_polpo"))
        .arg("health")
        .env_clear()
        .env("POLPO_BIND", bind)
        .output()
        .unwrap()
}

/// A server that answers one request, and that request's first line.
fn server(answer: &'static str) -> (SocketAddr, thread::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let served = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        stream.write_all(answer.as_bytes()).unwrap();
        let head = String::from_utf8(head).unwrap();
        head.lines().next().unwrap().to_owned()
    });
    (address, served)
}

#[test]
fn health_asks_a_server_that_listens_everywhere() {
    let (address, served) = server("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
    let output = health(&format!("0.0.0.0:{}", address.port()));
    assert_eq!(served.join().unwrap(), "GET /ready HTTP/1.1");
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout.is_empty() && output.stderr.is_empty());
}

#[test]
fn health_says_what_the_server_lacks() {
    let (address, served) = server(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 47\r\n\r\n{\"status\":\"the database needs `polpo migrate`\"}",
    );
    let output = health(&address.to_string());
    served.join().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        format!(
            "polpo: the server at http://{address}/ready is not ready (503 Service Unavailable): the database needs `polpo migrate`\n"
        )
    );
}

#[test]
fn health_says_that_nobody_answers() {
    // Bound and dropped: nobody listens there.
    let address = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let output = health(&address.to_string());
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    let begin = format!("polpo: no server answers at http://{address}/ready: ");
    assert!(
        said.starts_with(&begin) && said.lines().count() == 1,
        "{said}"
    );
}
