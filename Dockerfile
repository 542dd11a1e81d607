# syntax=docker/dockerfile:1
FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
COPY . .
# The statements are checked against the committed `.sqlx`: building needs no database.
ENV SQLX_OFFLINE=true
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin polpo \
    && strip -o /polpo target/release/polpo

# glibc, libgcc, certificates to know providers by; no shell, no package manager. Its user is 65532.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /polpo /usr/local/bin/polpo
COPY LICENSE /LICENSE
ENV POLPO_BIND=0.0.0.0:3890 POLPO_LOG_FORMAT=json
EXPOSE 3890
USER 65532:65532
# Longer than `polpo health` waits, so that it can say what is wrong.
HEALTHCHECK --interval=10s --timeout=10s --start-period=10s --retries=3 CMD ["polpo", "health"]
ENTRYPOINT ["polpo"]
CMD ["serve"]
