-- Missions to be filled in and run again. The body is as it was checked, without anything unknown.

create table playbooks (
    project_id uuid not null,
    name text not null,
    body jsonb not null,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    primary key (project_id, name)
);
