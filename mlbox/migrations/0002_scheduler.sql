-- The scheduler: shared GPUs, dependencies, arrays, preemption, reservations, faults. Times and forms as in 0001.

ALTER TABLE jobs ADD COLUMN gpu_mem_mib INTEGER CHECK (gpu_mem_mib IS NULL OR (gpu_mem_mib > 0 AND gpus = 0));
ALTER TABLE jobs ADD COLUMN preemptible INTEGER NOT NULL DEFAULT 0 CHECK (preemptible IN (0, 1));
ALTER TABLE jobs ADD COLUMN launch TEXT CHECK (launch IN ('plain', 'torchrun'));
ALTER TABLE jobs ADD COLUMN output TEXT;
ALTER TABLE jobs ADD COLUMN error TEXT;
-- {"number": 10, "before_s": 120, "main_only": false}
ALTER TABLE jobs ADD COLUMN warn_signal TEXT;
-- JSON lists of text.
ALTER TABLE jobs ADD COLUMN notify TEXT NOT NULL DEFAULT '[]';
ALTER TABLE jobs ADD COLUMN notify_on TEXT NOT NULL DEFAULT '["end","fail"]';
-- The array's id is that of its first job.
ALTER TABLE jobs ADD COLUMN array_id INTEGER;
ALTER TABLE jobs ADD COLUMN array_index INTEGER CHECK ((array_index IS NULL) = (array_id IS NULL));
ALTER TABLE jobs ADD COLUMN array_size INTEGER CHECK ((array_size IS NULL) = (array_id IS NULL) AND array_size > 0);
ALTER TABLE jobs ADD COLUMN array_at_once INTEGER CHECK (array_at_once IS NULL OR (array_at_once > 0 AND array_id IS NOT NULL));
-- Since when nothing but the queue keeps it waiting. Null while a job that it depends on has not ended.
ALTER TABLE jobs ADD COLUMN eligible_at REAL;
-- What it waits for when it was begun outside mlbox and taken in: a process, not a program to run.
ALTER TABLE jobs ADD COLUMN adopted INTEGER NOT NULL DEFAULT 0 CHECK (adopted IN (0, 1));

UPDATE jobs SET eligible_at = submitted_at;

CREATE UNIQUE INDEX jobs_by_array ON jobs (array_id, array_index) WHERE array_id IS NOT NULL;
CREATE INDEX jobs_with_files ON jobs (ended_at) WHERE ended_at IS NOT NULL AND removed_at IS NULL;

-- Who waits for whom. A parent that is ended stays here: it is history.
CREATE TABLE dependencies (
    job_id INTEGER NOT NULL REFERENCES jobs (id),
    parent_id INTEGER NOT NULL REFERENCES jobs (id),
    after TEXT NOT NULL CHECK (after IN ('afterok', 'afterany', 'afternotok')),
    met_at REAL,
    PRIMARY KEY (job_id, parent_id, after),
    CHECK (parent_id < job_id)
) STRICT, WITHOUT ROWID;

CREATE INDEX dependencies_by_parent ON dependencies (parent_id, job_id) WHERE met_at IS NULL;

CREATE TRIGGER jobs_start_when_met BEFORE UPDATE OF state ON jobs
WHEN NEW.state = 'starting' AND EXISTS (SELECT 1 FROM dependencies WHERE job_id = NEW.id AND met_at IS NULL)
BEGIN
    SELECT RAISE(ABORT, 'a job that still depends on another cannot start');
END;

-- What an attempt is charged for each second: GPUs by weight and share, or CPU slots by theirs.
ALTER TABLE attempts ADD COLUMN charge_rate REAL NOT NULL DEFAULT 0 CHECK (charge_rate >= 0);
-- Whether it started while a job before it was blocked: such a preemptible one gives way to that job.
ALTER TABLE attempts ADD COLUMN backfilled INTEGER NOT NULL DEFAULT 0 CHECK (backfilled IN (0, 1));
-- That mlbox itself wants it to end, and why: the job is not cancelled.
ALTER TABLE attempts ADD COLUMN stop_requested_at REAL;
ALTER TABLE attempts ADD COLUMN stop_why TEXT CHECK (stop_why IN ('preempted', 'over_share', 'idle', 'gpu_failed'));
ALTER TABLE attempts ADD COLUMN stop_cause TEXT;
-- The process that an adopted job's attempt took in: its pid, and its start in clock ticks since boot.
ALTER TABLE attempts ADD COLUMN adopted_pid INTEGER;
ALTER TABLE attempts ADD COLUMN adopted_ticks INTEGER CHECK ((adopted_ticks IS NULL) = (adopted_pid IS NULL));
-- GPU-seconds for which its GPUs did nothing.
ALTER TABLE attempts ADD COLUMN idle_gpu_seconds REAL NOT NULL DEFAULT 0;

UPDATE attempts SET charge_rate = CASE gpu_uuids WHEN '' THEN 0
    ELSE 1 + length(gpu_uuids) - length(replace(gpu_uuids, ',', '')) END;

CREATE INDEX attempts_by_end ON attempts (ended_at);

-- A share of a GPU has a number above 0 and its memory; a whole GPU is share 0 and has none.
ALTER TABLE leases ADD COLUMN memory_mib INTEGER CHECK ((memory_mib IS NULL) = (share = 0));

CREATE TRIGGER leases_whole_or_shared BEFORE INSERT ON leases
WHEN EXISTS (SELECT 1 FROM leases WHERE gpu_uuid = NEW.gpu_uuid AND released_at IS NULL
    AND (share = 0) <> (NEW.share = 0))
BEGIN
    SELECT RAISE(ABORT, 'a GPU is leased whole or in shares, not both');
END;

-- Windows in which GPUs are kept for somebody, or for nobody (maintenance). `gpu_uuids` is a JSON list.
CREATE TABLE reservations (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    gpu_uuids TEXT NOT NULL,
    starts_at REAL NOT NULL,
    ends_at REAL NOT NULL CHECK (ends_at > starts_at),
    for_user TEXT,
    for_project TEXT,
    made_by TEXT NOT NULL,
    made_at REAL NOT NULL,
    cancelled_at REAL
) STRICT;

-- What went wrong with a GPU under a job, by which a GPU that fails everybody is known.
CREATE TABLE gpu_faults (
    id INTEGER PRIMARY KEY,
    gpu_uuid TEXT NOT NULL,
    at REAL NOT NULL,
    source TEXT NOT NULL CHECK (source IN ('recovery_action', 'nvml', 'xid', 'job')),
    code INTEGER,
    cause TEXT NOT NULL,
    job_id INTEGER REFERENCES jobs (id),
    uid INTEGER,
    cleared_at REAL
) STRICT;

CREATE INDEX gpu_faults_open ON gpu_faults (gpu_uuid) WHERE cleared_at IS NULL;

-- What people were told, or are to be told: shown on the page; sent where the configuration says how.
CREATE TABLE notices (
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    user TEXT NOT NULL,
    uid INTEGER NOT NULL,
    job_id INTEGER REFERENCES jobs (id),
    kind TEXT NOT NULL,
    text TEXT NOT NULL,
    addresses TEXT NOT NULL DEFAULT '[]',
    sent_at REAL,
    failure TEXT
) STRICT;

CREATE INDEX notices_by_uid ON notices (uid, id);
CREATE INDEX notices_unsent ON notices (id) WHERE sent_at IS NULL AND addresses <> '[]';
