-- Who uses the server: organizations, their projects, and what opens them.

create table organizations (
    id uuid primary key,
    name text not null,
    slug text not null constraint organizations_slug_key unique,
    created_at timestamptz not null default now()
);

create table projects (
    id uuid primary key,
    org_id uuid not null constraint projects_org_fkey references organizations (id),
    name text not null,
    slug text not null constraint projects_slug_key unique,
    status text not null default 'active' check (status in ('active', 'suspended', 'deleted')),
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);

create index projects_by_org on projects (org_id, id);

-- A key is 256 random bits, so a plain SHA-256 of it is enough to store.
create table api_keys (
    id uuid primary key,
    project_id uuid not null constraint api_keys_project_fkey references projects (id) on delete cascade,
    name text not null,
    environment text not null check (environment in ('live', 'test')),
    hash bytea not null constraint api_keys_hash_key unique,
    prefix text not null,
    last_four text not null,
    created_at timestamptz not null default now(),
    last_used_at timestamptz
);

create index api_keys_by_project on api_keys (project_id, id);

-- A project's own keys for model providers, sealed under the master key named by `sealed_with`.
create table credentials (
    project_id uuid not null constraint credentials_project_fkey references projects (id) on delete cascade,
    provider text not null,
    label text,
    base_url text,
    masked_key text not null,
    sealed_with text not null,
    sealed_key bytea not null,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    primary key (project_id, provider)
);

-- Tells every process which project's warm entries are out of date.
create table changes (
    seq bigint generated always as identity primary key,
    project_id uuid not null,
    at timestamptz not null default clock_timestamp()
);

create index changes_by_time on changes (at);
