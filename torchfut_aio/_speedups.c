/* The hot paths of the package, in C.

   Each function of the table FAST stands for a Python function, which is its specification. It
   handles the common case: exact types, completions without devices and callbacks, loops of
   asyncio's kind. For everything else it returns PYTHON, before it has changed anything that the
   Python function does not do again; and that function runs.

   1. State stays in the objects that Python uses: dicts, a deque, slots. So Python and C can take
      turns on the same future.
   2. The GIL is held. What runs between two calls that may run Python code is one step, which no
      other thread and no signal handler can divide. In 3.11, to allocate an object may run Python
      code too: the garbage collector calls finalisers.
   3. A reference is borrowed only within such a step.
   4. An exception can only come from a call. So there are fewer points at which an interrupt must
      be repaired than in Python. Most repairs are done in Python. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>
#ifdef __linux__
#include <math.h>
#include <sys/timerfd.h>
#endif

#if PY_VERSION_HEX < 0x030B0000 || PY_VERSION_HEX >= 0x030F0000
#error "not tested on this version of Python, which uses the Python functions instead"
#endif
#ifdef Py_GIL_DISABLED
#error "rule 2 needs a GIL"
#endif

#if PY_VERSION_HEX < 0x030C0000
static PyObject *PyErr_GetRaisedException(void)
{
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    if (!type)
        return NULL;
    PyErr_NormalizeException(&type, &error, &traceback);
    if (traceback)
        PyException_SetTraceback(error, traceback);
    Py_DECREF(type);
    Py_XDECREF(traceback);
    return error;
}

static void PyErr_SetRaisedException(PyObject *error)
{
    PyErr_Restore(Py_NewRef(Py_TYPE(error)), error, PyException_GetTraceback(error));
}
#endif

static char python_is_needed;
#define PYTHON ((PyObject *)&python_is_needed)

static int is_installed; /* `install` has filled the variables below */
static int in_use;       /* from then on, unless tests want the Python functions */

/* ------------------------------------------------- what it uses of the package and of asyncio */

static PyObject *OUTCOME, *CALLBACK, *BURST, *HOST_ONLY, *KINDS;
static PyTypeObject *Outcome, *Future, *AsyncioLoop, *StreamState, *ValueStream, *Reader, *Waiters;
static PyObject *call_contained, *start_new_thread, *set_value_in_torch, *current, *this_thread;
static PyObject *wake_taken_again, *asyncio_events, *still_waits, *InvalidStateError;
static PyObject *Handle, *run_of_handles;
static PyObject *sys_modules; /* a reference, as the interpreter drops its own before others */
static PyTypeObject *AsyncioFuture, *AsyncioTask;
static Py_ssize_t many; /* the fewest waiters of a burst */

static const struct {
    void *where;
    const char *module, *name;
} USED[] = {
    {&OUTCOME, "_core._completion", "OUTCOME"},
    {&CALLBACK, "_core._callbacks", "CALLBACK"},
    {&BURST, "_loops._loop", "BURST"},
    {&KINDS, "_loops._loop", "KINDS"},
    {&HOST_ONLY, "_devices", "HOST_ONLY"},
    {&Outcome, "_core._outcome", "Outcome"},
    {&Future, "_future", "Future"},
    {&AsyncioLoop, "_loops._asyncio", "AsyncioLoop"},
    {&StreamState, "serving._stream_state", "StreamState"},
    {&ValueStream, "serving._stream", "ValueStream"},
    {&Reader, "serving._stream", "_Reader"},
    {&Waiters, "_waiters", "Waiters"},
    {&wake_taken_again, "_waiters", "_wake_again"},
    {&call_contained, "_threads", "call_contained"},
    {&start_new_thread, "_core._completion", "start_new_thread"},
    {&set_value_in_torch, "_core._torch_future", "set_value_in_torch"},
    {&current, "_loops._loop", "current"},
    {&this_thread, "_loops._loop", "_this_thread"},
    {&asyncio_events, "_cpython", "_events"},
    {&still_waits, "_cpython", "still_waits"},
    {&Handle, "_cpython", "_Handle"},
    {&run_of_handles, "_cpython", "_run"},
    {&AsyncioFuture, "_cpython", "_Future"},
    {&AsyncioTask, "_cpython", "_Task"},
};

/* The offsets of slots, in the objects of these types and of their subclasses. */
static Py_ssize_t future_state, future_devices, outcome_value;
static Py_ssize_t loop_queue, loop_wake_up, loop_thread, loop_event_loop, loop_taken, loop_renewed,
    loop_at_once, loop_burst, loop_checkpoints_suspend;
static Py_ssize_t stream_state, reader_state, state_values, state_end, state_room, state_readers;
static Py_ssize_t waiters_waiting, waiters_lines;

static const struct {
    Py_ssize_t *where;
    void *type;
    const char *name;
} SLOTS[] = {
    {&future_state, &Future, "_state"},
    {&future_devices, &Future, "_devices"},
    {&outcome_value, &Outcome, "value"},
    {&loop_queue, &AsyncioLoop, "queue"},
    {&loop_wake_up, &AsyncioLoop, "wake_up"},
    {&loop_thread, &AsyncioLoop, "thread"},
    {&loop_event_loop, &AsyncioLoop, "event_loop"},
    {&loop_taken, &AsyncioLoop, "_taken"},
    {&loop_renewed, &AsyncioLoop, "_renewed"},
    {&loop_at_once, &AsyncioLoop, "_at_once"},
    {&loop_burst, &AsyncioLoop, "_burst"},
    {&loop_checkpoints_suspend, &AsyncioLoop, "checkpoints_suspend"},
    {&stream_state, &ValueStream, "_state"},
    {&reader_state, &Reader, "_state"},
    {&state_values, &StreamState, "values"},
    {&state_end, &StreamState, "end"},
    {&state_room, &StreamState, "room"},
    {&state_readers, &StreamState, "readers"},
    {&waiters_waiting, &Waiters, "waiting"},
    {&waiters_lines, &Waiters, "lines"},
};

#define SLOT(object, offset) (*(PyObject **)((char *)(object) + (offset)))

/* Names of attributes. */
#define NAMES(X)                                                                                 \
    X(_callbacks) X(_get_running_loop) X(_run) X(_take_back) X(append) X(appendleft)             \
    X(_expect_burst) X(_wake_up_lost) X(call_soon) X(call_soon_threadsafe) X(cancel)             \
    X(is_closed) X(run_wake_up) X(before_wait) X(checkpoint) X(close) X(create_future)           \
    X(end_read) X(error) X(get_debug) X(get_loop) X(leave_line) X(line_up) X(loop) X(popleft)    \
    X(read) X(readiness) X(ready) X(remove_done_callback) X(renew_wake_up) X(schedule_wake_up)   \
    X(set_result) X(throw) X(value) X(wait) X(waiter) X(wake) X(wake_again)
#define DECLARE(name) static PyObject *s_##name;
NAMES(DECLARE)

/* ---------------------------------------------------------------------------- small helpers */

/* Return 0 and drop a result; -1 if it is an error. */
static int dropped(PyObject *result)
{
    Py_XDECREF(result);
    return result ? 0 : -1;
}

static int call_method(PyObject *object, PyObject *name, PyObject *argument)
{
    return dropped(argument ? PyObject_CallMethodOneArg(object, name, argument)
                            : PyObject_CallMethodNoArgs(object, name));
}

static int is_true(PyObject *result)
{
    int truth = result ? PyObject_IsTrue(result) : -1;
    Py_XDECREF(result);
    return truth;
}

/* Return an attribute that is a slot, as a new reference. */
static PyObject *get_slot(PyObject *object, Py_ssize_t offset, const char *name)
{
    PyObject *value = SLOT(object, offset);
    if (!value)
        PyErr_SetString(PyExc_AttributeError, name);
    return Py_XNewRef(value);
}

/* Delete a key of a dict that may not be there. */
static int discard(PyObject *dict, PyObject *key)
{
    if (PyDict_DelItem(dict, key) == 0)
        return 0;
    if (!PyErr_ExceptionMatches(PyExc_KeyError))
        return -1;
    PyErr_Clear();
    return 0;
}

/* Return 1 if no kernel can fill a value: `type(value) in HOST_ONLY`, which are a few types. */
static int is_host_only(PyObject *value)
{
    PyObject *type = (PyObject *)Py_TYPE(value);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(HOST_ONLY); i++)
        if (type == PyTuple_GET_ITEM(HOST_ONLY, i))
            return 1;
    return 0;
}

/* Return the outcome of a value that is host-only, so refers to nothing: nor can a cycle of
   references lead through the outcome, and the garbage collector need not visit it. */
static PyObject *new_outcome(PyObject *value)
{
    PyObject *outcome = Outcome->tp_alloc(Outcome, 0);
    if (outcome) {
        PyObject_GC_UnTrack(outcome);
        SLOT(outcome, outcome_value) = Py_NewRef(value);
    }
    return outcome;
}

/* Borrow the dict in a slot; or return NULL, without an error, if it is no dict. */
static PyObject *dict_slot(PyObject *object, Py_ssize_t offset)
{
    PyObject *dict = SLOT(object, offset);
    return dict && PyDict_CheckExact(dict) ? dict : NULL;
}

#if PY_VERSION_HEX < 0x030C0000
#define FRAMES_LEFT recursion_remaining
#else
#define FRAMES_LEFT py_recursion_remaining
#endif

/* Return 1 if the stack has room for calls of C and of Python, so that repeat() can start a thread,
   which calls the audit hooks of the program; else raise. */
static int has_room(void)
{
    if (Py_EnterRecursiveCall(" to wake what waits"))
        return 0;
    Py_LeaveRecursiveCall();
    if (PyThreadState_Get()->FRAMES_LEFT > 10)
        return 1;
    PyErr_SetString(PyExc_RecursionError, "maximum recursion depth exceeded to wake what waits");
    return 0;
}

/* Raise an error again, unless what was called since then has failed too. Steal `error`. */
static void raise_again(PyObject *error, int failed)
{
    if (failed)
        Py_DECREF(error);
    else
        PyErr_SetRaisedException(error);
}

/* Call `call[0](*call[1:])`, which does again what an error has interrupted: in a new thread if the
   stack is full. Steal both; `error` may be NULL. Return -1 with the first error, or 0 if there was
   none. */
static int repeat(PyObject *error, PyObject *call)
{
    if (call && dropped(PyObject_Vectorcall(PyTuple_GET_ITEM(call, 0), &PyTuple_GET_ITEM(call, 1),
                                            PyTuple_GET_SIZE(call) - 1, NULL)) < 0) {
        PyObject *second = PyErr_GetRaisedException();
        raise_again(second, dropped(PyObject_CallFunctionObjArgs(start_new_thread, call_contained,
                                                                 call, NULL)));
    }
    Py_XDECREF(call);
    if (error)
        PyErr_SetRaisedException(error); /* instead of a later one */
    return PyErr_Occurred() ? -1 : 0;
}

/* ------------------------------------------------------------------------- waking, any thread */

static int runs_in_this_thread(PyObject *loop)
{
    PyObject *thread = SLOT(loop, loop_thread);
    if (!thread || !PyLong_CheckExact(thread))
        return 1; /* unknown: Python looks again, or the loops are compared */
    unsigned long ident = PyLong_AsUnsignedLong(thread);
    if (ident == (unsigned long)-1 && PyErr_Occurred()) {
        PyErr_Clear();
        return 1;
    }
    return ident == PyThread_get_thread_ident();
}

/* AsyncioLoop.call_soon(self, function), from another thread than the loop's */
static PyObject *call_soon(PyObject *const *arguments)
{
    PyObject *loop = arguments[0], *event_loop, *error = NULL;
    if (Py_TYPE(loop) != AsyncioLoop || runs_in_this_thread(loop))
        return PYTHON;
    if (!(event_loop = PyObject_CallNoArgs(SLOT(loop, loop_event_loop))))
        return NULL;
    if (event_loop == Py_None) { /* it was garbage-collected */
        Py_DECREF(event_loop);
        Py_RETURN_FALSE;
    }
    PyObject *call = PyObject_CallMethodOneArg(event_loop, s_call_soon_threadsafe, arguments[1]);
    int closed = -1;
    if (call || PyErr_ExceptionMatches(PyExc_RuntimeError)) {
        if (!call)
            error = PyErr_GetRaisedException();
        closed = is_true(PyObject_CallMethodNoArgs(event_loop, s_is_closed));
        if (closed > 0 && call && call_method(call, s_cancel, NULL) < 0)
            closed = -1;
        if (error && closed == 0) /* it is of something else */
            PyErr_SetRaisedException(Py_NewRef(error));
    }
    Py_XDECREF(call);
    Py_XDECREF(error);
    Py_DECREF(event_loop);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(!closed);
}

/* Loop.schedule_wake_up(self) */
static PyObject *schedule_wake_up(PyObject *const *arguments)
{
    PyObject *loop = arguments[0];
    if (Py_TYPE(loop) != AsyncioLoop)
        return PYTHON;
    /* The loop gets the only reference to the method object. */
    PyObject *method = PyObject_GetAttr(loop, s_run_wake_up);
    PyObject *lost = PyObject_GetAttr(loop, s__wake_up_lost);
    PyObject *wake_up = method && lost ? PyWeakref_NewRef(method, lost) : NULL;
    int is_open = -1;
    if (wake_up) {
        Py_XSETREF(SLOT(loop, loop_wake_up), wake_up);
        is_open = is_true(PyObject_CallMethodOneArg(loop, s_call_soon, method));
    }
    if (is_open != 1)
        Py_XSETREF(SLOT(loop, loop_wake_up), Py_NewRef(Py_None));
    Py_XDECREF(lost);
    Py_XDECREF(method);
    /* If the loop is closed, Python finds the same, and drops the queue. */
    return is_open < 0 ? NULL : is_open ? Py_NewRef(Py_None) : PYTHON;
}

static int schedule(PyObject *loop)
{
    PyObject *result = SLOT(loop, loop_burst) == Py_None ? schedule_wake_up(&loop) : PYTHON;
    return result == PYTHON ? call_method(loop, s_schedule_wake_up, NULL) : dropped(result);
}

/* AsyncioLoop.wake, from another thread than the loop's; else the method of the waker. */
static int wake(PyObject *waker, PyObject *waiter)
{
    PyObject *queue;
    if (Py_TYPE(waker) != AsyncioLoop || runs_in_this_thread(waker) ||
        !(queue = SLOT(waker, loop_queue)))
        return call_method(waker, s_wake, waiter);
    Py_INCREF(queue);
    int failed = call_method(queue, s_append, waiter);
    Py_DECREF(queue);
    /* Append *before* reading `wake_up`: see Loop.wake(). */
    return failed || SLOT(waker, loop_wake_up) != Py_None ? failed : schedule(waker);
}

/* ------------------------------------------------------------------------ completing a future */

enum { TRY_COMPLETE, COMPLETE_ALL, OUTCOMES_OF_RESULTS, SET_RESULT, AWAIT, RESUME_TASKS, CALL_SOON,
       SCHEDULE_WAKE_UP, RUN_WAKE_UP, SET_TIMER, PUT, PUT_MANY, ANEXT };
static PyObject *python_of(int which);

/* Store the outcome of a plain value in a pending future that has no devices and no callbacks.
   Return 1; or 0, unchanged, if Python has to do it; or -1 for an error. */
static int claim(PyObject *future, PyObject *outcome)
{
    PyObject *devices = SLOT(future, future_devices), *state = dict_slot(future, future_state);
    if (!state || !devices || !PyTuple_CheckExact(devices) || PyTuple_GET_SIZE(devices))
        return 0;
    if (!has_room())
        return -1;
    PyObject *key, *waker;
    Py_ssize_t position = 0;
    while (PyDict_Next(state, &position, &key, &waker))
        if (key == OUTCOME || waker == CALLBACK || waker == Py_None)
            return 0;
    Py_INCREF(state); /* a comparison may run Python code */
    PyObject *stored = PyDict_SetDefault(state, OUTCOME, outcome);
    Py_DECREF(state);
    return stored ? stored == outcome : -1;
}

/* Wake one waiter, or move it to `waiters`; then remove it. Return 1 if it is a callback, or
   IGNORED: Python has to do it. */
static int deliver_one(PyObject *state, PyObject *waiter, PyObject *waker, PyObject *waiters)
{
    if (waker == CALLBACK || waker == Py_None)
        return 1;
    if (!waiters) {
        if (wake(waker, waiter) < 0)
            return -1;
    } else {
        PyObject *of_waker = PyDict_GetItemWithError(waiters, waker);
        if (of_waker) {
            if (!PyList_CheckExact(of_waker) || PyList_Append(of_waker, waiter) < 0)
                return -1;
        } else {
            PyObject *list = PyErr_Occurred() ? NULL : PyList_New(1);
            if (!list)
                return -1;
            PyList_SET_ITEM(list, 0, Py_NewRef(waiter));
            int failed = PyDict_SetItem(waiters, waker, list);
            Py_DECREF(list);
            if (failed)
                return -1;
        }
    }
    return discard(state, waiter); /* *after* that: see _claim() */
}

/* The rest of _claim(): as above, for all waiters of a future that was claimed. */
static int deliver(PyObject *state, PyObject *waiters)
{
    PyObject *waiter, *waker;
    Py_ssize_t position = 0;
    if (PyDict_GET_SIZE(state) == 1)
        return 0;
    if (PyDict_GET_SIZE(state) == 2) {
        while (PyDict_Next(state, &position, &waiter, &waker))
            if (waiter != OUTCOME) {
                Py_INCREF(waiter);
                Py_INCREF(waker);
                int result = deliver_one(state, waiter, waker, waiters);
                Py_DECREF(waiter);
                Py_DECREF(waker);
                return result;
            }
        return 0;
    }
    PyObject *keys = PyDict_Keys(state);
    int result = keys ? 0 : -1;
    for (Py_ssize_t i = 0; result == 0 && i < PyList_GET_SIZE(keys); i++) {
        waiter = PyList_GET_ITEM(keys, i);
        if (waiter == OUTCOME)
            continue;
        waker = Py_XNewRef(PyDict_GetItemWithError(state, waiter));
        if (waker)
            result = deliver_one(state, waiter, waker, waiters);
        else if (PyErr_Occurred())
            result = -1;
        Py_XDECREF(waker);
    }
    Py_XDECREF(keys);
    return result;
}

/* Wake the waiters of a future that was claimed, and complete the C++ future. Return 1 if Python
   has to do it again, as there is a callback: another thread is adding it just now. */
static int publish(PyObject *future, PyObject *outcome, PyObject *waiters)
{
    PyObject *state = get_slot(future, future_state, "_state");
    int result = state ? deliver(state, waiters) : -1;
    Py_XDECREF(state);
    if (result != 0)
        return result;
    PyObject *value = Py_NewRef(SLOT(outcome, outcome_value));
    PyObject *arguments[] = {NULL, future, value};
    result = dropped(PyObject_Vectorcall(set_value_in_torch, arguments + 1,
                                         2 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL));
    Py_DECREF(value);
    return result;
}

/* Return 1 if the future is completed, 0 if Python has to do it, -1 for an error. */
static int complete(PyObject *future, PyObject *outcome)
{
    int result = claim(future, outcome);
    if (result != 1)
        return result;
    if (publish(future, outcome, NULL) == 0)
        return 1;
    PyObject *error = PyErr_GetRaisedException(); /* as the handler of try_complete() */
    PyObject *call = Py_BuildValue("(O(O)(O)OO)", python_of(COMPLETE_ALL), future, outcome, Py_None,
                                   Py_True);
    return repeat(error, call) < 0 ? -1 : 1;
}

/* try_complete(future, outcome) */
static PyObject *try_complete(PyObject *const *arguments)
{
    PyObject *future = arguments[0], *outcome = arguments[1];
    if (!PyObject_TypeCheck(future, Future) || Py_TYPE(outcome) != Outcome ||
        !SLOT(outcome, outcome_value))
        return PYTHON;
    int result = complete(future, outcome);
    return result < 0 ? NULL : result == 0 ? PYTHON : Py_NewRef(Py_True);
}

/* Future.set_result(self, result) */
static PyObject *set_result(PyObject *const *arguments)
{
    PyObject *future = arguments[0], *value = arguments[1];
    if (!PyObject_TypeCheck(future, Future) || !is_host_only(value))
        return PYTHON;
    PyObject *outcome = new_outcome(value);
    if (!outcome)
        return NULL;
    int result = complete(future, outcome);
    Py_DECREF(outcome);
    return result < 0 ? NULL : result == 0 ? PYTHON : Py_NewRef(Py_None);
}

/* outcomes_of_results(futures, results) */
static PyObject *outcomes_of_results(PyObject *const *arguments)
{
    PyObject *futures = arguments[0], *results = arguments[1];
    if (!PyList_CheckExact(futures) || !PyList_CheckExact(results))
        return PYTHON;
    Py_ssize_t size = PyList_GET_SIZE(futures);
    PyObject *outcomes = PyList_New(0);
    if (!outcomes)
        return NULL;
    for (Py_ssize_t i = 0; i < size; i++) {
        /* Again each time, as to make an outcome may run Python code. */
        if (PyList_GET_SIZE(futures) != size || PyList_GET_SIZE(results) != size)
            goto in_python;
        PyObject *future = PyList_GET_ITEM(futures, i), *result = PyList_GET_ITEM(results, i);
        if (!PyObject_TypeCheck(future, Future) || !is_host_only(result))
            goto in_python;
        PyObject *devices = SLOT(future, future_devices);
        if (!devices || !PyTuple_CheckExact(devices) || PyTuple_GET_SIZE(devices))
            goto in_python;
        Py_INCREF(result);
        PyObject *outcome = new_outcome(result);
        Py_DECREF(result);
        if (!outcome || PyList_Append(outcomes, outcome) < 0) {
            Py_XDECREF(outcome);
            Py_DECREF(outcomes);
            return NULL;
        }
        Py_DECREF(outcome);
    }
    if (PyList_GET_SIZE(results) == size)
        return outcomes;
in_python:
    Py_DECREF(outcomes);
    return PYTHON;
}

/* _complete_all(futures, outcomes, waiters): C completes those up to the first uncommon one, then
   Python the rest, and wakes the loops. complete_all() repeats all of it if this is interrupted. */
static PyObject *complete_all(PyObject *const *arguments)
{
    PyObject *futures = arguments[0], *outcomes = arguments[1], *waiters = arguments[2];
    if (!PyList_CheckExact(futures) || !PyList_CheckExact(outcomes) ||
        !PyDict_CheckExact(waiters) || PyList_GET_SIZE(futures) != PyList_GET_SIZE(outcomes))
        return PYTHON;
    Py_ssize_t i = 0;
    for (; i < PyList_GET_SIZE(futures) && i < PyList_GET_SIZE(outcomes); i++) {
        PyObject *future = Py_NewRef(PyList_GET_ITEM(futures, i));
        PyObject *outcome = Py_NewRef(PyList_GET_ITEM(outcomes, i));
        int is_common = PyObject_TypeCheck(future, Future) && Py_TYPE(outcome) == Outcome &&
                        SLOT(outcome, outcome_value);
        int claimed = is_common ? claim(future, outcome) : 0;
        int result = claimed == 1 ? publish(future, outcome, waiters) : claimed;
        Py_DECREF(future);
        Py_DECREF(outcome);
        if (result < 0)
            return NULL;
        if (claimed == 0 || result == 1)
            break;
    }
    PyObject *rest[] = {PyList_GetSlice(futures, i, PY_SSIZE_T_MAX),
                        PyList_GetSlice(outcomes, i, PY_SSIZE_T_MAX), waiters};
    PyObject *refused = rest[0] && rest[1]
                            ? PyObject_Vectorcall(python_of(COMPLETE_ALL), rest, 3, NULL)
                            : NULL;
    Py_XDECREF(rest[0]);
    Py_XDECREF(rest[1]);
    return refused;
}

/* --------------------------------------------------------------- in the loop's thread: resuming */

/* resume_callback(): borrow the callback and the context of a task that waits, in a tuple; or
   return NULL, without an error. */
static PyObject *find_resume_callback(PyObject *callbacks)
{
    if (!PyList_CheckExact(callbacks) || !PyList_GET_SIZE(callbacks))
        return NULL;
    PyObject *pair = PyList_GET_ITEM(callbacks, 0);
    if (!PyTuple_CheckExact(pair) || PyTuple_GET_SIZE(pair) != 2)
        return NULL;
    PyObject *callback = PyTuple_GET_ITEM(pair, 0);
    int is_of_task = PyCFunction_CheckExact(callback) && PyCFunction_GET_SELF(callback) &&
                     PyObject_TypeCheck(PyCFunction_GET_SELF(callback), AsyncioTask) &&
                     PyContext_CheckExact(PyTuple_GET_ITEM(pair, 1));
    return is_of_task ? pair : NULL;
}

/* Keep what resumes a task, as its step did not begin: the next wake-up takes it. */
static void keep_taken(PyObject *loop, PyObject *pair)
{
    if (pair)
        Py_XSETREF(SLOT(loop, loop_taken), Py_NewRef(pair)); /* which is None: no code runs */
}

/* Run the step of a task; if it did not begin, put the waiter back. */
static int run_step(PyObject *loop, PyObject *queue, PyObject *waiter, PyObject *pair)
{
    PyObject *callback = PyTuple_GET_ITEM(pair, 0), *context = PyTuple_GET_ITEM(pair, 1);
    PyObject *result = NULL;
    if (PyContext_Enter(context) == 0) {
        result = PyObject_CallOneArg(callback, waiter);
        if (PyContext_Exit(context) < 0)
            Py_CLEAR(result);
    }
    if (result) {
        Py_DECREF(result);
        return 0;
    }
    PyObject *error = PyErr_GetRaisedException();
    PyObject *waits = PyObject_CallFunctionObjArgs(still_waits, callback, waiter, NULL);
    int failed = !waits;
    if (waits == Py_True) {
        keep_taken(loop, pair);
        failed = call_method(queue, s_appendleft, waiter);
    }
    Py_XDECREF(waits);
    raise_again(error, failed);
    return -1;
}

/* Resume the first waiter of the queue. Return 1 if Python has to do it. */
static int resume_first(PyObject *loop, PyObject *queue)
{
    PyObject *waiter = PySequence_GetItem(queue, 0);
    if (!waiter)
        return -1;
    if (Py_TYPE(waiter) != AsyncioFuture) {
        Py_DECREF(waiter);
        return 1;
    }
    int result = -1;
    PyObject *callbacks = PyObject_GetAttr(waiter, s__callbacks);
    PyObject *pair = callbacks ? Py_XNewRef(find_resume_callback(callbacks)) : NULL;
    if (!callbacks ||
        (pair && call_method(waiter, s_remove_done_callback, PyTuple_GET_ITEM(pair, 0)) < 0))
        goto end;
    if (call_method(waiter, s_set_result, Py_None) < 0) {
        if (!PyErr_ExceptionMatches(InvalidStateError)) {
            keep_taken(loop, pair);
            goto end;
        }
        PyErr_Clear(); /* it has been cancelled */
    }
    if (call_method(queue, s_popleft, NULL) < 0)
        keep_taken(loop, pair);
    else
        result = pair ? run_step(loop, queue, waiter, pair) : 0;
end:
    Py_DECREF(waiter);
    Py_XDECREF(callbacks);
    Py_XDECREF(pair);
    return result;
}

/* Return 1 if each task must have a separate handle, 0 if not, -1 for an error. */
static int needs_handles(PyObject *queue)
{
    PyObject *run = PyObject_GetAttr(Handle, s__run);
    if (!run)
        return -1;
    Py_DECREF(run);
    if (run != run_of_handles)
        return 1;
    PyObject *waiter = PySequence_GetItem(queue, 0);
    PyObject *loop = waiter ? PyObject_CallMethodNoArgs(waiter, s_get_loop) : NULL;
    int debug = loop ? is_true(PyObject_CallMethodNoArgs(loop, s_get_debug)) : -1;
    Py_XDECREF(waiter);
    Py_XDECREF(loop);
    return debug;
}

/* AsyncioLoop._resume_tasks(self, count) */
static PyObject *resume_tasks(PyObject *const *arguments)
{
    PyObject *loop = arguments[0];
    if (Py_TYPE(loop) != AsyncioLoop || !SLOT(loop, loop_queue) ||
        !PyLong_CheckExact(arguments[1]))
        return PYTHON;
    Py_ssize_t count = PyLong_AsSsize_t(arguments[1]), size;
    if (count == -1 && PyErr_Occurred())
        return NULL;
    PyObject *queue = Py_NewRef(SLOT(loop, loop_queue)), *result = NULL;
    if ((size = PyObject_Size(queue)) < 0)
        goto end;
    int status = size ? needs_handles(queue) : 0;
    for (; status == 0 && count > 0; count--) {
        if ((size = PyObject_Size(queue)) < 0)
            goto end;
        if (size == 0)
            break;
        /* Taken by a wake-up that was interrupted, also by one within a step of a task. */
        status = SLOT(loop, loop_taken) == Py_None ? resume_first(loop, queue) : 1;
        if (status == 1)
            break;
    }
    if (status == 0)
        result = Py_NewRef(Py_None);
    else if (status == 1) { /* the others */
        PyObject *others = PyLong_FromSsize_t(count);
        if (others)
            result = PyObject_CallFunctionObjArgs(python_of(RESUME_TASKS), loop, others, NULL);
        Py_XDECREF(others);
    }
end:
    Py_DECREF(queue);
    return result;
}

/* AsyncioLoop.run_wake_up(self) */
static PyObject *run_wake_up(PyObject *const *arguments)
{
    PyObject *loop = arguments[0], *result = NULL;
    if (Py_TYPE(loop) != AsyncioLoop || !SLOT(loop, loop_queue))
        return PYTHON;
    PyObject *queue = Py_NewRef(SLOT(loop, loop_queue));
    Py_XSETREF(SLOT(loop, loop_wake_up), Py_NewRef(Py_None));
    Py_XSETREF(SLOT(loop, loop_renewed), Py_NewRef(Py_False));
    Py_ssize_t size = PyObject_Size(queue);
    PyObject *count = size < 0 ? NULL : PyLong_FromSsize_t(size);
    if (count) {
        Py_ssize_t at_once = PyLong_AsSsize_t(SLOT(loop, loop_at_once)); /* no burst */
        int failed = at_once == -1 && PyErr_Occurred();
        Py_XSETREF(SLOT(loop, loop_at_once), PyLong_FromLong(0));
        if (!failed && size - at_once >= many)
            failed = call_method(loop, s__expect_burst, count);
        if (!failed) {
            PyObject *both[] = {loop, count};
            result = resume_tasks(both);
            if (result == PYTHON)
                result = PyObject_Vectorcall(python_of(RESUME_TASKS), both, 2, NULL);
        }
        Py_DECREF(count);
    }
    if (!result) {
        PyObject *error = PyErr_GetRaisedException();
        raise_again(error, PyObject_Size(queue) > 0 &&
                               call_method(loop, s_schedule_wake_up, NULL) < 0);
    }
    Py_DECREF(queue);
    return result;
}

/* TimerFd.set(self, seconds) */
static PyObject *set_timer(PyObject *const *arguments)
{
#ifdef __linux__
    double seconds = PyFloat_CheckExact(arguments[1]) ? PyFloat_AS_DOUBLE(arguments[1]) : -1;
    int is_common = (seconds >= 0 && seconds < 1e9) || seconds == HUGE_VAL;
    PyObject *value = is_common ? PyObject_GetAttr(arguments[0], s_value) : NULL;
    if (value && PyLong_CheckExact(value)) {
        long descriptor = PyLong_AsLong(value);
        struct itimerspec time = {{0, 0}, {0, 0}}; /* all zero stops the timer */
        if (seconds != HUGE_VAL) {
            long long nanoseconds = (long long)(seconds * 1e9);
            if (nanoseconds < 1)
                nanoseconds = 1;
            time.it_value.tv_sec = nanoseconds / 1000000000;
            time.it_value.tv_nsec = nanoseconds % 1000000000;
        }
        Py_DECREF(value);
        timerfd_settime((int)descriptor, 0, &time, NULL);
        Py_RETURN_NONE;
    }
    Py_XDECREF(value);
    PyErr_Clear();
#endif
    return PYTHON;
}

/* ------------------------------------------------------------- in the loop's thread: waiting */

/* `running() or current()` of _loops/_loop.py: the loop that runs here, as a new reference. */
static PyObject *running_loop(void)
{
    PyObject *library, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(KINDS, &position, &library, &value))
        if (PyDict_GetItemWithError(sys_modules, library) || PyErr_Occurred())
            goto in_python;
    PyObject *event_loop = PyObject_CallMethodNoArgs(asyncio_events, s__get_running_loop);
    if (!event_loop)
        return NULL;
    PyObject *loop = NULL, *here = NULL;
    if (event_loop != Py_None)
        loop = PyObject_GetAttr(this_thread, s_loop);
    if (loop && Py_TYPE(loop) == AsyncioLoop && runs_in_this_thread(loop))
        here = PyObject_CallNoArgs(SLOT(loop, loop_event_loop));
    Py_DECREF(event_loop);
    Py_XDECREF(here);
    if (here && here == event_loop)
        return loop;
    Py_XDECREF(loop);
in_python:
    PyErr_Clear();
    return PyObject_CallNoArgs(current);
}

/* Loop.waiter(), of an AsyncioLoop; of another loop, its method. */
static PyObject *new_waiter(PyObject *loop)
{
    if (Py_TYPE(loop) != AsyncioLoop)
        return PyObject_CallMethodNoArgs(loop, s_waiter);
    PyObject *before = PyObject_GetAttr((PyObject *)AsyncioLoop, s_before_wait);
    if (!before)
        return NULL;
    Py_DECREF(before);
    if (before != Py_None)
        return PyObject_CallMethodNoArgs(loop, s_waiter);
    PyObject *wake_up = SLOT(loop, loop_wake_up);
    if (wake_up != Py_None && wake_up != BURST && SLOT(loop, loop_renewed) != Py_True &&
        call_method(loop, s_renew_wake_up, NULL) < 0)
        return NULL;
    PyObject *event_loop = PyObject_CallNoArgs(SLOT(loop, loop_event_loop));
    if (!event_loop)
        return NULL;
    PyObject *waiter = PyObject_CallMethodNoArgs(event_loop, s_create_future);
    Py_DECREF(event_loop);
    return waiter;
}

/* A wait of a task: what `__await__` of a future and `__anext__` of a stream's iterator return.

   It suspends the task by means of another iterator, `inner`: of a waiter, of a checkpoint, of
   kernels, or a coroutine in Python. So what is sent or thrown into it, and a cancellation, act as
   they do on that iterator. When `inner` has returned, `next_step` decides about the next one. */

typedef struct Wait Wait;

typedef struct {
    /* Set `inner` and return PYGEN_NEXT; or return the result; or an error. Takes what the last
       `inner` has returned, NULL at first. */
    PySendResult (*next_step)(Wait *self, PyObject *returned, PyObject **result);
    /* Remove the waiter. */
    int (*leave)(Wait *self);
    /* An error ends the wait. */
    int (*fail)(Wait *self);
    int is_coroutine;
} WaitKind;

struct Wait {
    PyObject_HEAD
    const WaitKind *kind;
    PyObject *of;     /* the future, or the state of the stream */
    PyObject *loop;   /* of the waiter */
    PyObject *waiter; /* while `of` has it */
    PyObject *inner;
    enum { NEW, WAITS, CHECKPOINT, KERNELS, IN_PYTHON, ENDED } stage;
    char is_running;
};

static PyTypeObject WaitType;

static PyObject *new_wait(const WaitKind *kind, PyObject *of)
{
    Wait *self = PyObject_GC_New(Wait, &WaitType);
    if (!self)
        return NULL;
    self->kind = kind;
    self->of = Py_NewRef(of);
    self->loop = self->waiter = self->inner = NULL;
    self->stage = NEW;
    self->is_running = 0;
    PyObject_GC_Track(self);
    return (PyObject *)self;
}

/* Suspend by an iterator of `iterable`, which it steals; NULL is an error. */
static PySendResult suspend_by(Wait *self, PyObject *iterable, int stage)
{
    PyObject *inner = iterable ? PyObject_GetIter(iterable) : NULL;
    Py_XDECREF(iterable);
    if (!inner)
        return PYGEN_ERROR;
    Py_XSETREF(self->inner, inner);
    self->stage = stage;
    return PYGEN_NEXT;
}

static void clear_waiter(Wait *self)
{
    Py_CLEAR(self->waiter);
    Py_CLEAR(self->loop);
}

/* Raise RuntimeError from a StopIteration, as a generator does. */
static PyObject *no_stop_iteration(PyObject *error)
{
    if (!error || !PyObject_TypeCheck(error, (PyTypeObject *)PyExc_StopIteration))
        return error;
    PyErr_SetString(PyExc_RuntimeError, "generator raised StopIteration");
    PyObject *raised = PyErr_GetRaisedException();
    PyException_SetContext(raised, Py_NewRef(error));
    PyException_SetCause(raised, error);
    return raised;
}

/* End the wait: leave if the waiter is still there, and let nothing refer to anything. If that
   raises, its error replaces the one of the wait. */
static PySendResult end_wait(Wait *self, PySendResult how, PyObject **result)
{
    PyObject *error = how == PYGEN_ERROR ? no_stop_iteration(PyErr_GetRaisedException()) : NULL;
    int failed = self->waiter ? self->kind->leave(self) : 0;
    if (how == PYGEN_ERROR && self->kind->fail) {
        PyObject *first = failed ? PyErr_GetRaisedException() : NULL;
        failed = self->kind->fail(self);
        if (!failed && first) {
            PyErr_SetRaisedException(first);
            failed = -1;
        } else
            Py_XDECREF(first);
    }
    self->stage = ENDED;
    clear_waiter(self);
    Py_CLEAR(self->inner);
    Py_CLEAR(self->of);
    if (failed) {
        Py_XDECREF(error);
        Py_CLEAR(*result);
        return PYGEN_ERROR;
    }
    if (error)
        PyErr_SetRaisedException(error);
    return how;
}

/* Go on until something suspends the task, or the wait has ended. `how` and `*result` are of the
   last inner iterator. */
static PySendResult go_on(Wait *self, PySendResult how, PyObject **result)
{
    while (how == PYGEN_RETURN) {
        PyObject *returned = *result;
        *result = NULL;
        Py_CLEAR(self->inner);
        how = self->kind->next_step(self, returned, result);
        Py_XDECREF(returned);
        if (how != PYGEN_NEXT)
            break;
        how = PyIter_Send(self->inner, Py_None, result);
    }
    if (how != PYGEN_NEXT)
        how = end_wait(self, how, result);
    self->is_running = 0;
    return how;
}

static int begins_to_run(Wait *self)
{
    if (self->is_running) {
        PyErr_SetString(PyExc_ValueError, "the wait is already executing");
        return 0;
    }
    if (self->stage == ENDED && self->kind->is_coroutine) {
        PyErr_SetString(PyExc_RuntimeError, "cannot reuse already awaited coroutine");
        return 0;
    }
    self->is_running = 1;
    return 1;
}

static PySendResult wait_send(Wait *self, PyObject *value, PyObject **result)
{
    *result = NULL;
    if (!begins_to_run(self))
        return PYGEN_ERROR;
    if (self->stage == ENDED) {
        self->is_running = 0;
        *result = Py_NewRef(Py_None);
        return PYGEN_RETURN;
    }
    /* A reference, as what it calls may drop this object, or what it suspends by. */
    Py_INCREF(self);
    PySendResult how = PYGEN_RETURN; /* of no iterator */
    if (self->stage != NEW)
        how = PyIter_Send(self->inner, value, result);
    how = go_on(self, how, result);
    Py_DECREF(self);
    return how;
}

/* Return what is yielded; for a result, raise StopIteration. */
static PyObject *as_iterator(PySendResult how, PyObject *result)
{
    if (how == PYGEN_RETURN) {
        PyObject *stop = PyObject_CallOneArg(PyExc_StopIteration, result);
        Py_DECREF(result);
        if (stop)
            PyErr_SetRaisedException(stop);
        return NULL;
    }
    return how == PYGEN_NEXT ? result : NULL;
}

static PyObject *wait_send_method(Wait *self, PyObject *value)
{
    PyObject *result;
    PySendResult how = wait_send(self, value, &result);
    return as_iterator(how, result);
}

static PyObject *wait_next(Wait *self)
{
    return wait_send_method(self, Py_None);
}

/* Raise what was thrown: an exception; or a type, an exception or arguments, and a traceback. */
static void raise_thrown(PyObject *const *arguments, Py_ssize_t number)
{
    PyObject *type = arguments[0];
    if (PyExceptionInstance_Check(type))
        PyErr_SetObject((PyObject *)Py_TYPE(type), type);
    else if (PyExceptionClass_Check(type))
        PyErr_SetObject(type, number > 1 ? arguments[1] : NULL);
    else
        PyErr_SetString(PyExc_TypeError, "exceptions must be classes or instances deriving from "
                                         "BaseException");
    if (number > 2 && PyTraceBack_Check(arguments[2])) {
        PyObject *error = PyErr_GetRaisedException();
        PyException_SetTraceback(error, arguments[2]);
        PyErr_SetRaisedException(error);
    }
}

/* `inner` stays where it is while the wait is running. */
static int close_inner(Wait *self)
{
    PyObject *close = PyObject_GetAttr(self->inner, s_close);
    if (!close && PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Clear(); /* not every iterator has it */
        return 0;
    }
    int failed = close ? dropped(PyObject_CallNoArgs(close)) : -1;
    Py_XDECREF(close);
    return failed;
}

static PyObject *wait_throw(Wait *self, PyObject *const *arguments, Py_ssize_t number)
{
    PyObject *result = NULL;
    if (number < 1 || number > 3) {
        PyErr_SetString(PyExc_TypeError, "throw() takes 1 to 3 arguments");
        return NULL;
    }
    if (!begins_to_run(self))
        return NULL;
    if (self->stage == ENDED || self->stage == NEW) {
        raise_thrown(arguments, number);
        if (self->stage == NEW)
            PyErr_SetRaisedException(no_stop_iteration(PyErr_GetRaisedException()));
        self->stage = ENDED;
        self->is_running = 0;
        Py_CLEAR(self->of);
        return NULL;
    }
    Py_INCREF(self);
    PySendResult how = PYGEN_ERROR;
    if (PyErr_GivenExceptionMatches(arguments[0], PyExc_GeneratorExit)) {
        if (close_inner(self) == 0)
            raise_thrown(arguments, number);
    } else {
        PyObject *method = PyObject_GetAttr(self->inner, s_throw);
        if (method) {
            result = PyObject_Vectorcall(method, arguments, number, NULL);
            Py_DECREF(method);
            if (result)
                how = PYGEN_NEXT;
            else if (PyErr_ExceptionMatches(PyExc_StopIteration)) {
                PyObject *stop = PyErr_GetRaisedException();
                result = PyObject_GetAttr(stop, s_value);
                Py_DECREF(stop);
                how = result ? PYGEN_RETURN : PYGEN_ERROR;
            }
        } else if (PyErr_ExceptionMatches(PyExc_AttributeError)) {
            PyErr_Clear();
            raise_thrown(arguments, number);
        }
    }
    how = go_on(self, how, &result);
    Py_DECREF(self);
    return as_iterator(how, result);
}

static PyObject *wait_close(Wait *self, PyObject *Py_UNUSED(ignored))
{
    PyObject *result = NULL;
    if (!self->is_running && (self->stage == ENDED || self->stage == NEW)) {
        self->stage = ENDED;
        Py_CLEAR(self->of);
        Py_RETURN_NONE;
    }
    if (!begins_to_run(self))
        return NULL;
    Py_INCREF(self);
    if (close_inner(self) == 0)
        PyErr_SetNone(PyExc_GeneratorExit);
    end_wait(self, PYGEN_ERROR, &result);
    self->is_running = 0;
    Py_DECREF(self);
    if (!PyErr_ExceptionMatches(PyExc_GeneratorExit))
        return NULL;
    PyErr_Clear();
    Py_RETURN_NONE;
}

static void wait_finalize(Wait *self)
{
    if (self->stage == ENDED || (self->stage == NEW && !self->kind->is_coroutine))
        return;
    PyObject *error = PyErr_GetRaisedException();
    if (self->stage == NEW
            ? PyErr_WarnEx(PyExc_RuntimeWarning,
                           "coroutine '_Reader.__anext__' was never awaited", 1)
            : dropped(wait_close(self, NULL)))
        PyErr_WriteUnraisable((PyObject *)self);
    if (error)
        PyErr_SetRaisedException(error);
}

static int wait_clear(Wait *self)
{
    self->stage = ENDED; /* first, as what it drops may run Python code */
    clear_waiter(self);
    Py_CLEAR(self->inner);
    Py_CLEAR(self->of);
    return 0;
}

static int wait_traverse(Wait *self, visitproc visit, void *arg)
{
    Py_VISIT(self->of);
    Py_VISIT(self->loop);
    Py_VISIT(self->waiter);
    Py_VISIT(self->inner);
    return 0;
}

static void wait_dealloc(Wait *self)
{
    if (self->stage != ENDED && PyObject_CallFinalizerFromDealloc((PyObject *)self) < 0)
        return; /* something refers to it again */
    PyObject_GC_UnTrack(self);
    wait_clear(self);
    PyObject_GC_Del(self);
}

/* The name of the Python function: asyncio and trio show it. */
static PyObject *wait_name(Wait *self, void *attribute)
{
    return PyObject_GetAttrString(python_of(self->kind->is_coroutine ? ANEXT : AWAIT), attribute);
}

static PyGetSetDef wait_attributes[] = {
    {"__name__", (getter)wait_name, NULL, NULL, "__name__"},
    {"__qualname__", (getter)wait_name, NULL, NULL, "__qualname__"},
    {NULL},
};
static PyMethodDef wait_methods[] = {
    {"send", (PyCFunction)wait_send_method, METH_O, NULL},
    {"throw", (PyCFunction)(void (*)(void))wait_throw, METH_FASTCALL, NULL},
    {"close", (PyCFunction)wait_close, METH_NOARGS, NULL},
    {NULL},
};

static PyAsyncMethods wait_async = {
    .am_await = PyObject_SelfIter,
    .am_send = (sendfunc)wait_send,
};

static PyTypeObject WaitType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "torchfut_aio._speedups.Wait",
    .tp_basicsize = sizeof(Wait),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_dealloc = (destructor)wait_dealloc,
    .tp_finalize = (destructor)wait_finalize,
    .tp_traverse = (traverseproc)wait_traverse,
    .tp_clear = (inquiry)wait_clear,
    .tp_iter = PyObject_SelfIter,
    .tp_iternext = (iternextfunc)wait_next,
    .tp_methods = wait_methods,
    .tp_getset = wait_attributes,
    .tp_as_async = &wait_async,
};

/* --------------------------------------------------------------------- waiting for a future */

/* Return the value of a future that is done, or raise its error; or wait for kernels first. */
static PySendResult take_outcome(Wait *self, PyObject *state, PyObject **result)
{
    PyObject *outcome = Py_XNewRef(PyDict_GetItemWithError(state, OUTCOME));
    if (!outcome) {
        if (!PyErr_Occurred())
            PyErr_SetObject(PyExc_KeyError, OUTCOME); /* other code has woken the task */
        return PYGEN_ERROR;
    }
    if (Py_TYPE(outcome) == Outcome) {
        *result = get_slot(outcome, outcome_value, "value");
        Py_DECREF(outcome);
        return *result ? PYGEN_RETURN : PYGEN_ERROR;
    }
    PySendResult how = PYGEN_ERROR;
    PyObject *readiness = NULL, *error = PyObject_GetAttr(outcome, s_error);
    if (error && error != Py_None)
        *result = PyObject_CallMethodNoArgs(outcome, s_read); /* raises it */
    else if (error && (readiness = PyObject_GetAttr(outcome, s_readiness))) {
        if (readiness != Py_None && self->stage != KERNELS)
            how = suspend_by(self, PyObject_CallMethodNoArgs(readiness, s_ready), KERNELS);
        else if (readiness == Py_None || call_method(readiness, s_wait, NULL) == 0)
            *result = PyObject_GetAttr(outcome, s_value);
    }
    if (*result)
        how = PYGEN_RETURN;
    Py_XDECREF(error);
    Py_XDECREF(readiness);
    Py_DECREF(outcome);
    return how;
}

static PySendResult checkpoint(Wait *self, PyObject *loop, PyObject *state, PyObject **result)
{
    if (Py_TYPE(loop) == AsyncioLoop && SLOT(loop, loop_checkpoints_suspend) == Py_False)
        return take_outcome(self, state, result);
    return suspend_by(self, PyObject_CallMethodNoArgs(loop, s_checkpoint), CHECKPOINT);
}

/* The first step of Future.__await__(). */
static PySendResult begin_await(Wait *self, PyObject *state, PyObject **result)
{
    PySendResult how = PYGEN_ERROR;
    PyObject *waiter = NULL, *loop = running_loop();
    int done = loop ? PyDict_Contains(state, OUTCOME) : -1;
    if (done == 0) {
        if (!(waiter = new_waiter(loop)) || PyDict_SetItem(state, waiter, loop) < 0)
            goto end;
        self->waiter = Py_NewRef(waiter); /* an error removes it: see end_wait() */
        self->loop = Py_NewRef(loop);
        /* Stored before the check for the outcome: rule 3 of _core. */
        done = PyDict_Contains(state, OUTCOME);
        if (done == 0)
            how = suspend_by(self, Py_NewRef(waiter), WAITS);
        else if (done == 1) {
            if (discard(state, waiter) < 0)
                goto end;
            clear_waiter(self);
        }
    }
    if (done == 1)
        how = checkpoint(self, loop, state, result);
end:
    Py_XDECREF(waiter);
    Py_XDECREF(loop);
    return how;
}

static PySendResult await_next_step(Wait *self, PyObject *Py_UNUSED(returned), PyObject **result)
{
    PyObject *state = get_slot(self->of, future_state, "_state");
    if (!state)
        return PYGEN_ERROR;
    PySendResult how;
    if (self->stage == NEW)
        how = begin_await(self, state, result);
    else {
        clear_waiter(self); /* the completion has removed it */
        how = take_outcome(self, state, result);
    }
    Py_DECREF(state);
    return how;
}

static int await_leave(Wait *self)
{
    PyObject *state = get_slot(self->of, future_state, "_state");
    int failed = state ? discard(state, self->waiter) : -1;
    Py_XDECREF(state);
    return failed;
}

static const WaitKind AWAITS_FUTURE = {await_next_step, await_leave, NULL, 0};

/* Future.__await__(self); of a subclass, in Python. */
static PyObject *await(PyObject *const *arguments)
{
    PyObject *future = arguments[0];
    if (Py_TYPE(future) != Future || !dict_slot(future, future_state))
        return PYTHON;
    return new_wait(&AWAITS_FUTURE, future);
}

/* -------------------------------------------------------------------------------- streams */

static int is_plain_state(PyObject *state)
{
    return state && Py_TYPE(state) == StreamState && SLOT(state, state_room) == Py_None &&
           SLOT(state, state_values) && PyODict_CheckExact(SLOT(state, state_values)) &&
           dict_slot(state, state_end) && SLOT(state, state_readers) &&
           Py_TYPE(SLOT(state, state_readers)) == Waiters &&
           dict_slot(SLOT(state, state_readers), waiters_waiting) &&
           dict_slot(SLOT(state, state_readers), waiters_lines);
}

/* Waiters.wake(events), for what was put. */
static int wake_waiters(PyObject *readers, Py_ssize_t number)
{
    PyObject *waiting = SLOT(readers, waiters_waiting), *waiter, *waker;
    Py_ssize_t position = 0;
    if (PyDict_GET_SIZE(SLOT(readers, waiters_lines))) {
        PyObject *count = PyLong_FromSsize_t(number);
        int failed = count ? call_method(readers, s_wake, count) : -1;
        Py_XDECREF(count);
        return failed;
    }
    if (!PyDict_Next(waiting, &position, &waiter, &waker))
        return 0;
    Py_INCREF(waiter);
    Py_INCREF(waker);
    int failed = PyDict_DelItem(waiting, waiter);
    if (!failed && wake(waker, waiter) < 0) {
        PyObject *error = PyErr_GetRaisedException();
        failed = repeat(error, Py_BuildValue("(O[(OO)])", wake_taken_again, waiter, waker));
    }
    Py_DECREF(waiter);
    Py_DECREF(waker);
    return failed;
}

/* StreamState.put() and put_many(). */
static PyObject *store(PyObject *state, PyObject *outcomes)
{
    int failed = 0;
    Py_ssize_t number = PyList_GET_SIZE(outcomes);
    PyObject *values = Py_NewRef(SLOT(state, state_values));
    PyObject *readers = Py_NewRef(SLOT(state, state_readers));
    for (Py_ssize_t i = 0; !failed && i < number; i++)
        failed = PyODict_SetItem(values, PyList_GET_ITEM(outcomes, i), Py_None);
    if (!failed && PyDict_GET_SIZE(SLOT(state, state_end)))
        failed = call_method(state, s__take_back, outcomes);
    if (!failed)
        failed = wake_waiters(readers, number);
    if (failed) {
        PyObject *error = PyErr_GetRaisedException();
        PyObject *again = PyObject_GetAttr(readers, s_wake_again);
        repeat(error, again ? Py_BuildValue("(Nn)", again, number) : NULL);
    }
    Py_DECREF(values);
    Py_DECREF(readers);
    return failed ? NULL : Py_NewRef(Py_None);
}

/* Put the host-only values of an exact list or tuple into a stream. */
static PyObject *put_values(PyObject *stream, PyObject *values)
{
    if (!PyObject_TypeCheck(stream, ValueStream) || !is_plain_state(SLOT(stream, stream_state)))
        return PYTHON;
    Py_ssize_t size = PySequence_Fast_GET_SIZE(values);
    PyObject *outcomes = PyList_New(size);
    if (!outcomes)
        return NULL;
    PyObject_GC_UnTrack(outcomes); /* or Python code could find it while items are missing */
    for (Py_ssize_t i = 0; i < size; i++) {
        /* To make an outcome may run Python code, which may change a list. */
        PyObject *value = i < PySequence_Fast_GET_SIZE(values)
                              ? Py_NewRef(PySequence_Fast_GET_ITEM(values, i))
                              : NULL;
        PyObject *outcome = NULL;
        int in_python = !value || !is_host_only(value);
        if (!in_python && (outcome = new_outcome(value)))
            PyList_SET_ITEM(outcomes, i, outcome);
        Py_XDECREF(value);
        if (!outcome) {
            Py_DECREF(outcomes);
            return in_python ? PYTHON : NULL;
        }
    }
    PyObject *result = PYTHON, *state = Py_XNewRef(SLOT(stream, stream_state));
    if (is_plain_state(state) && !PyDict_GET_SIZE(SLOT(state, state_end)))
        result = has_room() ? store(state, outcomes) : NULL;
    Py_XDECREF(state);
    Py_DECREF(outcomes);
    return result;
}

/* ValueStream.put(self, value) */
static PyObject *put(PyObject *const *arguments)
{
    PyObject *values = is_host_only(arguments[1]) ? PyTuple_Pack(1, arguments[1]) : PYTHON;
    if (!values || values == PYTHON)
        return values;
    PyObject *result = put_values(arguments[0], values);
    Py_DECREF(values);
    return result;
}

/* ValueStream.put_many(self, values) */
static PyObject *put_many(PyObject *const *arguments)
{
    PyObject *values = arguments[1];
    if (!(PyList_CheckExact(values) || PyTuple_CheckExact(values)) ||
        !PySequence_Fast_GET_SIZE(values))
        return PYTHON;
    return put_values(arguments[0], values);
}

/* Continue in the coroutine of _Reader.__anext__(). */
static PySendResult continue_in_python(Wait *self)
{
    PyObject *reader = Reader->tp_alloc(Reader, 0), *coroutine = NULL;
    if (reader) {
        SLOT(reader, reader_state) = Py_NewRef(self->of);
        coroutine = PyObject_CallOneArg(python_of(ANEXT), reader);
        Py_DECREF(reader);
    }
    if (!coroutine)
        return PYGEN_ERROR;
    Py_XSETREF(self->inner, coroutine);
    self->stage = IN_PYTHON;
    return PYGEN_NEXT;
}

/* Take the first value of a stream that has one. */
static PySendResult take_value(Wait *self, PyObject *values, PyObject **result)
{
    PyObject *iterator = PyObject_GetIter(values);
    PyObject *outcome = iterator ? PyIter_Next(iterator) : NULL;
    Py_XDECREF(iterator);
    if (outcome && Py_TYPE(outcome) == Outcome && PyODict_DelItem(values, outcome) == 0) {
        *result = get_slot(outcome, outcome_value, "value");
        Py_DECREF(outcome);
        return *result ? PYGEN_RETURN : PYGEN_ERROR;
    }
    Py_XDECREF(outcome);
    PyErr_Clear(); /* an uncommon value, or one that another reader has: Python looks again */
    return continue_in_python(self);
}

static PySendResult wait_for_value(Wait *self, PyObject *state, PyObject *readers)
{
    PyObject *waiting = Py_NewRef(SLOT(readers, waiters_waiting));
    PyObject *loop = running_loop(), *waiter = loop ? new_waiter(loop) : NULL;
    PySendResult how = PYGEN_ERROR;
    if (waiter && PyDict_SetItem(waiting, waiter, loop) == 0) {
        self->waiter = Py_NewRef(waiter);
        self->loop = Py_NewRef(loop);
        int failed = 0;
        if (PyDict_GET_SIZE(waiting) > 1)
            failed = dropped(PyObject_CallMethodObjArgs(readers, s_line_up, waiter, loop, NULL));
        if (!failed) {
            if (PyODict_SIZE(SLOT(state, state_values)) || PyDict_GET_SIZE(SLOT(state, state_end)))
                how = suspend_by(self, PyTuple_New(0), WAITS); /* empty: it looks again */
            else
                how = suspend_by(self, Py_NewRef(waiter), WAITS);
        }
    }
    Py_DECREF(waiting);
    Py_XDECREF(waiter);
    Py_XDECREF(loop);
    return how;
}

static int reader_leave(Wait *self)
{
    PyObject *readers = Py_NewRef(SLOT(self->of, state_readers));
    PyObject *waiting = Py_NewRef(SLOT(readers, waiters_waiting));
    int failed = discard(waiting, self->waiter);
    Py_DECREF(waiting);
    if (!failed && PyDict_GET_SIZE(SLOT(readers, waiters_lines)))
        failed = dropped(PyObject_CallMethodObjArgs(readers, s_leave_line, self->waiter,
                                                    self->loop, NULL));
    Py_DECREF(readers);
    return failed;
}

/* The handler of __anext__(): another reader may have to take what this one was woken for. */
static int reader_fail(Wait *self)
{
    PyObject *state = Py_NewRef(self->of);
    int failed = call_method(state, s_end_read, Py_None);
    if (failed) {
        PyObject *error = PyErr_GetRaisedException();
        raise_again(error, call_method(state, s_end_read, Py_None));
    }
    Py_DECREF(state);
    return failed;
}

static PySendResult reader_next_step(Wait *self, PyObject *returned, PyObject **result)
{
    if (self->stage == IN_PYTHON) {
        *result = Py_NewRef(returned);
        return PYGEN_RETURN;
    }
    PySendResult how = PYGEN_ERROR;
    PyObject *state = Py_NewRef(self->of);
    if (self->stage == WAITS) {
        int failed = reader_leave(self);
        clear_waiter(self);
        if (failed)
            goto end;
    }
    if (!is_plain_state(state)) {
        how = continue_in_python(self);
        goto end;
    }
    PyObject *values = Py_NewRef(SLOT(state, state_values));
    PyObject *readers = Py_NewRef(SLOT(state, state_readers));
    if (PyODict_SIZE(values))
        how = take_value(self, values, result);
    else if (PyDict_GET_SIZE(SLOT(state, state_end)))
        how = continue_in_python(self);
    else
        how = wait_for_value(self, state, readers);
    Py_DECREF(values);
    Py_DECREF(readers);
end:
    Py_DECREF(state);
    return how;
}

static const WaitKind READS_STREAM = {reader_next_step, reader_leave, reader_fail, 1};

/* _Reader.__anext__(self); of a stream with a bound, in Python. */
static PyObject *anext(PyObject *const *arguments)
{
    PyObject *reader = arguments[0];
    if (!PyObject_TypeCheck(reader, Reader) || !is_plain_state(SLOT(reader, reader_state)))
        return PYTHON;
    PyObject *state = Py_NewRef(SLOT(reader, reader_state)); /* which may leave the stream */
    PyObject *read = new_wait(&READS_STREAM, state);
    Py_DECREF(state);
    return read;
}

/* -------------------------------------------------------------------------------- speedups */

static struct {
    const char *name; /* of the Python function, within the package */
    int number;       /* of the arguments, all by position: other calls are made in Python */
    PyObject *(*fast)(PyObject *const *arguments);
    PyObject *python;
} FAST[] = {
    [TRY_COMPLETE] = {"_core._completion.try_complete", 2, try_complete},
    [COMPLETE_ALL] = {"_core._completion._complete_all", 3, complete_all},
    [OUTCOMES_OF_RESULTS] = {"_core._outcome.outcomes_of_results", 2, outcomes_of_results},
    [SET_RESULT] = {"_future.Future.set_result", 2, set_result},
    [AWAIT] = {"_future.Future.__await__", 1, await},
    [RESUME_TASKS] = {"_loops._asyncio.AsyncioLoop._resume_tasks", 2, resume_tasks},
    [CALL_SOON] = {"_loops._asyncio.AsyncioLoop.call_soon", 2, call_soon},
    [SCHEDULE_WAKE_UP] = {"_loops._loop.Loop.schedule_wake_up", 1, schedule_wake_up},
    [RUN_WAKE_UP] = {"_loops._asyncio.AsyncioLoop.run_wake_up", 1, run_wake_up},
    [SET_TIMER] = {"_loops._alarm.TimerFd.set", 2, set_timer},
    [PUT] = {"serving._stream.ValueStream.put", 2, put},
    [PUT_MANY] = {"serving._stream.ValueStream.put_many", 2, put_many},
    [ANEXT] = {"serving._stream._Reader.__anext__", 1, anext},
};

static PyObject *python_of(int which)
{
    return FAST[which].python;
}

/* A Python function whose common case runs in C. All its attributes are those of the function. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *python;
    PyObject *weakrefs;
    int which;
} Speedup;

static PyTypeObject SpeedupType;

static PyObject *speedup_call(Speedup *self, PyObject *const *arguments, size_t number,
                              PyObject *names)
{
    if (in_use && !names && PyVectorcall_NARGS(number) == FAST[self->which].number) {
        PyObject *result = FAST[self->which].fast(arguments);
        if (result != PYTHON)
            return result;
    }
    return PyObject_Vectorcall(self->python, arguments, number, names);
}

static PyObject *speedup_new(PyTypeObject *Py_UNUSED(type), PyObject *arguments,
                             PyObject *Py_UNUSED(names))
{
    PyObject *python, *module, *name = NULL, *full = NULL;
    Speedup *self = NULL;
    if (!PyArg_ParseTuple(arguments, "O", &python))
        return NULL;
    if ((module = PyObject_GetAttrString(python, "__module__")) &&
        (name = PyObject_GetAttrString(python, "__qualname__")))
        full = PyUnicode_FromFormat("%S.%S", module, name);
    for (size_t i = 0; full && i < Py_ARRAY_LENGTH(FAST); i++) {
        PyObject *known = PyUnicode_FromFormat("torchfut_aio.%s", FAST[i].name);
        if (!known || PyUnicode_Compare(known, full) != 0) {
            Py_XDECREF(known);
            continue;
        }
        Py_DECREF(known);
        if ((self = PyObject_GC_New(Speedup, &SpeedupType))) {
            self->vectorcall = (vectorcallfunc)speedup_call;
            self->python = Py_NewRef(python);
            self->weakrefs = NULL;
            self->which = (int)i;
            Py_XSETREF(FAST[i].python, Py_NewRef(python));
            PyObject_GC_Track(self);
        }
        break;
    }
    if (!self && !PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "there is no %R in C", full);
    Py_XDECREF(module);
    Py_XDECREF(name);
    Py_XDECREF(full);
    return (PyObject *)self;
}

static PyObject *speedup_bind(PyObject *self, PyObject *object, PyObject *Py_UNUSED(type))
{
    return object && object != Py_None ? PyMethod_New(self, object) : Py_NewRef(self);
}

static PyObject *speedup_getattr(Speedup *self, PyObject *name)
{
    PyObject *value = PyObject_GenericGetAttr((PyObject *)self, name);
    if (!value && PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Clear();
        value = PyObject_GetAttr(self->python, name);
    }
    return value;
}

static PyObject *speedup_doc(Speedup *self, void *Py_UNUSED(closure))
{
    return PyObject_GetAttrString(self->python, "__doc__");
}

static PyObject *speedup_repr(Speedup *self)
{
    return PyUnicode_FromFormat("<%R in C>", self->python);
}

static int speedup_traverse(Speedup *self, visitproc visit, void *arg)
{
    Py_VISIT(self->python);
    return 0;
}

static void speedup_dealloc(Speedup *self)
{
    PyObject_GC_UnTrack(self);
    if (self->weakrefs)
        PyObject_ClearWeakRefs((PyObject *)self);
    Py_DECREF(self->python);
    PyObject_GC_Del(self);
}

/* isinstance() takes it for a function, as do unittest.mock and inspect. */
static PyObject *speedup_class(Speedup *self, void *Py_UNUSED(closure))
{
    return Py_NewRef(Py_TYPE(self->python));
}

/* It is copied and pickled by its name. */
static PyObject *speedup_reduce(Speedup *self, PyObject *Py_UNUSED(ignored))
{
    return PyObject_GetAttrString(self->python, "__qualname__");
}

static PyMethodDef speedup_methods[] = {
    {"__reduce__", (PyCFunction)speedup_reduce, METH_NOARGS, NULL},
    {NULL},
};
static PyGetSetDef speedup_attributes[] = {
    {"__class__", (getter)speedup_class},
    {"__doc__", (getter)speedup_doc},
    {NULL},
};
static PyMemberDef speedup_members[] = {
    {"__wrapped__", T_OBJECT, offsetof(Speedup, python), READONLY},
    {NULL},
};

static PyTypeObject SpeedupType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "torchfut_aio._speedups.Speedup",
    .tp_doc = "A Python function whose common case runs in C.",
    .tp_basicsize = sizeof(Speedup),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL |
                Py_TPFLAGS_METHOD_DESCRIPTOR,
    .tp_vectorcall_offset = offsetof(Speedup, vectorcall),
    .tp_call = PyVectorcall_Call,
    .tp_new = speedup_new,
    .tp_dealloc = (destructor)speedup_dealloc,
    .tp_traverse = (traverseproc)speedup_traverse,
    .tp_descr_get = speedup_bind,
    .tp_getattro = (getattrofunc)speedup_getattr,
    .tp_repr = (reprfunc)speedup_repr,
    .tp_weaklistoffset = offsetof(Speedup, weakrefs),
    .tp_methods = speedup_methods,
    .tp_getset = speedup_attributes,
    .tp_members = speedup_members,
};

/* ---------------------------------------------------------------------------------- module */

static int find_slot(Py_ssize_t *offset, PyObject *type, const char *name)
{
    PyObject *slot = PyObject_GetAttrString(type, name);
    int found = slot && Py_IS_TYPE(slot, &PyMemberDescr_Type);
    if (found)
        *offset = ((PyMemberDescrObject *)slot)->d_member->offset;
    else if (slot)
        PyErr_Format(PyExc_TypeError, "%s of %R is not a slot", name, type);
    Py_XDECREF(slot);
    return found ? 0 : -1;
}

static PyObject *attribute_of_module(const char *package, const char *module, const char *name)
{
    PyObject *full = PyUnicode_FromFormat("%s%s", package, module);
    PyObject *imported = full ? PyImport_Import(full) : NULL;
    PyObject *found = imported ? PyObject_GetAttrString(imported, name) : NULL;
    Py_XDECREF(full);
    Py_XDECREF(imported);
    return found;
}

static PyObject *install(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    for (size_t i = 0; i < Py_ARRAY_LENGTH(USED); i++) {
        PyObject *found = attribute_of_module("torchfut_aio.", USED[i].module, USED[i].name);
        if (!found)
            return NULL;
        Py_XSETREF(*(PyObject **)USED[i].where, found);
    }
    Py_XSETREF(sys_modules, Py_NewRef(PyImport_GetModuleDict()));
    Py_XSETREF(HOST_ONLY, PySequence_Tuple(HOST_ONLY));
    if (!HOST_ONLY)
        return NULL;
    Py_XSETREF(InvalidStateError, attribute_of_module("", "asyncio", "InvalidStateError"));
    if (!InvalidStateError)
        return NULL;
    PyTypeObject *types[] = {Outcome, Future, AsyncioLoop, StreamState, ValueStream, Reader,
                             Waiters, AsyncioFuture, AsyncioTask};
    for (size_t i = 0; i < Py_ARRAY_LENGTH(types); i++)
        if (!PyType_Check((PyObject *)types[i]))
            return PyErr_Format(PyExc_TypeError, "%R is not a type", types[i]);
    for (size_t i = 0; i < Py_ARRAY_LENGTH(SLOTS); i++)
        if (find_slot(SLOTS[i].where, *(PyObject **)SLOTS[i].type, SLOTS[i].name) < 0)
            return NULL;
    PyObject *number = attribute_of_module("torchfut_aio.", "_loops._asyncio", "MANY");
    many = number ? PyLong_AsSsize_t(number) : -1;
    Py_XDECREF(number);
    if (many < 0)
        return NULL;
    for (size_t i = 0; i < Py_ARRAY_LENGTH(FAST); i++)
        if (!FAST[i].python)
            return PyErr_Format(PyExc_RuntimeError, "%s has no @speedup", FAST[i].name);
    in_use = is_installed = 1;
    Py_RETURN_NONE;
}

static PyObject *use(PyObject *Py_UNUSED(module), PyObject *flag)
{
    int before = in_use, now = PyObject_IsTrue(flag);
    if (now < 0)
        return NULL;
    in_use = now && is_installed;
    return PyBool_FromLong(before);
}

static PyObject *is_in_use(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyBool_FromLong(in_use);
}

static PyMethodDef functions[] = {
    {"install", install, METH_NOARGS, NULL},
    {"use", use, METH_O, NULL},
    {"in_use", is_in_use, METH_NOARGS, NULL},
    {NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "torchfut_aio._speedups", NULL, -1, functions,
};

PyMODINIT_FUNC PyInit__speedups(void)
{
#define INTERN(name)                                          \
    if (!(s_##name = PyUnicode_InternFromString(#name)))      \
        return NULL;
    NAMES(INTERN)
    if (PyType_Ready(&WaitType) < 0 || PyType_Ready(&SpeedupType) < 0)
        return NULL;
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddObjectRef(made, "Speedup", (PyObject *)&SpeedupType) < 0)
        Py_CLEAR(made);
    return made;
}
