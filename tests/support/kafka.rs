//! A client of Kafka's protocol for tests that need to see every answer: one connection, one request at a time.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use kafka_protocol::messages::{RequestHeader, ResponseHeader};
use kafka_protocol::protocol::{Decodable, Encodable, HeaderVersion, Request, StrBytes};

/// A broker that is silent for longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Connection {
    stream: TcpStream,
    correlation: i32,
}

impl Connection {
    pub fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            correlation: 0,
        })
    }

    /// Sends a request and waits for its answer.
    pub fn call<R: Request>(&mut self, version: i16, request: &R) -> io::Result<R::Response> {
        let message = self.message(version, request)?;
        self.stream.write_all(&message)?;
        let answer = self.receive()?;
        self.decode::<R>(version, self.correlation, answer)
    }

    /// Sends requests at once and waits for all their answers.
    pub fn call_all<R: Request>(
        &mut self,
        version: i16,
        requests: &[R],
    ) -> io::Result<Vec<R::Response>> {
        let first = self.correlation + 1;
        let mut bytes = Vec::new();
        for request in requests {
            bytes.extend(self.message(version, request)?);
        }
        let mut writer = self.stream.try_clone()?;
        let sender = std::thread::spawn(move || writer.write_all(&bytes));
        let answers = (first..=self.correlation).map(|correlation| {
            let answer = self.receive()?;
            self.decode::<R>(version, correlation, answer)
        });
        let answers = answers.collect();
        sender.join().expect("it only sends")?;
        answers
    }

    /// Its socket.
    pub fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// A request with its length, of the next correlation id.
    pub fn message<R: Request>(&mut self, version: i16, request: &R) -> io::Result<Vec<u8>> {
        self.correlation += 1;
        let mut body = BytesMut::new();
        RequestHeader::default()
            .with_request_api_key(R::KEY)
            .with_request_api_version(version)
            .with_correlation_id(self.correlation)
            .with_client_id(Some(StrBytes::from_static_str("taffrail-test")))
            .encode(&mut body, R::header_version(version))
            .map_err(io::Error::other)?;
        request
            .encode(&mut body, version)
            .map_err(io::Error::other)?;
        let mut message = (body.len() as u32).to_be_bytes().to_vec();
        message.extend_from_slice(&body);
        Ok(message)
    }

    fn receive(&self) -> io::Result<Bytes> {
        let mut stream = &self.stream;
        let mut size = [0; 4];
        stream.read_exact(&mut size)?;
        let mut answer = vec![0; u32::from_be_bytes(size) as usize];
        stream.read_exact(&mut answer)?;
        Ok(answer.into())
    }

    fn decode<R: Request>(
        &self,
        version: i16,
        correlation: i32,
        mut answer: Bytes,
    ) -> io::Result<R::Response> {
        let header = ResponseHeader::decode(&mut answer, R::Response::header_version(version))
            .map_err(io::Error::other)?;
        assert_eq!(header.correlation_id, correlation);
        R::Response::decode(&mut answer, version).map_err(io::Error::other)
    }
}
