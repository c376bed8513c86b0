// Scrolling that stays with the reader: at the end it follows the answer, anywhere else it does not move.

const NEAR = 32; // pixels from the end that still count as the end

export class Follow {
  /** `content` grows inside `scroller`; `button` leads back to the end. */
  constructor(scroller, content, button) {
    this.scroller = scroller;
    this.button = button;
    this.following = true;
    this.last = 0;
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    button.addEventListener("click", () => this.toEnd());
    // Called between layout and paint, so nobody sees the place before.
    const observer = new ResizeObserver(() => this.#resized());
    observer.observe(scroller);
    observer.observe(content);
  }

  toEnd() {
    this.following = true;
    this.#resized();
  }

  get #distance() {
    return this.scroller.scrollHeight - this.scroller.clientHeight - this.scroller.scrollTop;
  }

  #scrolled() {
    const { scrollTop } = this.scroller;
    // A step upwards lets go at once, however small it is. Nothing else does: that the end is far away may only mean
    // that the answer has grown since the step that this event is about.
    if (scrollTop < this.last) this.following = this.#distance < 2;
    else this.following ||= this.#distance < NEAR;
    this.last = scrollTop;
    this.button.hidden = this.following;
  }

  #resized() {
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.last = this.scroller.scrollTop;
    this.button.hidden = this.following || this.#distance < NEAR;
  }
}
